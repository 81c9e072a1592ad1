"""ConfinedFS: no path leads out of the home. (With other file systems of ours: test_local.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bridge.filesystems.jail import ConfinedFS


def test_a_link_swapped_in_after_the_check_leads_nowhere(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    (home / "dir").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("secret")
    fs = ConfinedFS(str(home), None)
    path = str(home / "dir" / "secret")
    assert fs.validpath(path)
    (home / "dir").rmdir()
    (home / "dir").symlink_to(outside)
    for deed in (
        lambda: fs.open(path, "rb"),
        lambda: fs.open(path, "wb"),
        lambda: fs.remove(path),
        lambda: fs.chmod(path, 0o777),
        lambda: fs.utime(path, 0),
        lambda: fs.stat(path),
        lambda: fs.lstat(path),
        lambda: fs.mkdir(path + "2"),
        lambda: fs.rename(path, str(home / "got")),
        lambda: fs.listdir(str(home / "dir")),
        lambda: fs.mkstemp(dir=str(home / "dir")),
    ):
        with pytest.raises(PermissionError):
            deed()
    assert not fs.isfile(path)
    assert not fs.lexists(path)
    assert (outside / "secret").read_text() == "secret"
    assert os.listdir(outside) == ["secret"]
