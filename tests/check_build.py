"""Build the sdist and the wheel, install the wheel into a new environment, and try it from an empty folder.

    python tests/check_build.py DIRECTORY

DIRECTORY, which must exist, takes the distributions and the environment. Needs `build`. Checked is what
tests that run in the checkout cannot see: what is packed, and that it works with nothing else around.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs in the new environment: argv[1] is the wheel's version.
INSTALLED = """
import importlib, importlib.metadata, pathlib, pkgutil, sys
import gevent.monkey
import bridge

place = pathlib.Path(bridge.__file__).parent
version = importlib.metadata.version("pyftpdlib-gevent")
assert pathlib.Path(sys.prefix) in place.parents, f"imported from {place}"
assert (place / "py.typed").is_file(), f"no py.typed in {place}"
assert bridge.__version__ == version == sys.argv[1], (bridge.__version__, version, sys.argv[1])
assert not gevent.monkey.saved, "importing bridge has patched something"
assert bridge.GeventIOLoop().close() is None
rooms = [each.name for each in pkgutil.iter_modules(bridge.__path__) if each.ispkg]
assert "loop" in rooms and "ftp" in rooms, rooms
for room in rooms:
    importlib.import_module(f"bridge.{room}")
for asset in ("status.css", "status.js"):
    assert (place / "web" / asset).is_file(), f"no {asset} in {place}"
"""


def run(*command: str, cwd: Path) -> str:
    """Run *command* with nothing of this process's Python around; return what it prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    shown = " ".join(word for word in command if "\n" not in word)
    print("+", shown, flush=True)
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=300
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\ncheck_build.py: exit code {done.returncode} of {shown}")
    return done.stdout


def expect(found: object, expected: object, what: str) -> None:
    """End with a message if *found* is not what was *expected*."""
    if found != expected:
        sys.exit(f"check_build.py: {what}: {found!r}, expected {expected!r}")


def main(directory: Path) -> None:
    """Build, look into the files, install, try."""
    dist, environment, empty = directory / "dist", directory / "venv", directory / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "build", f"--outdir={dist}", str(ROOT), cwd=empty)
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    version = wheel.name.split("-")[1]
    expect(wheel.name, f"pyftpdlib_gevent-{version}-py3-none-any.whl", "the wheel's name")

    files = ("*.py", "*.css", "*.js", "py.typed")
    modules = {str(path.relative_to(ROOT)) for each in files for path in (ROOT / "bridge").rglob(each)}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expect(names, modules, "the wheel's files")
    with tarfile.open(sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = modules | {"LICENSE", "README.md", "pyproject.toml"}
    expect(wanted - packed, set(), "missing in the sdist")

    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", str(wheel), cwd=empty)
    run(python, "-c", INSTALLED, version, cwd=empty)
    for option, text in (("--help", "usage: python -m bridge.ftp"), ("--version", version)):
        shown = run(python, "-m", "bridge.ftp", option, cwd=empty)
        expect(text in shown, True, f"{text!r} in what {option} prints")
    print(f"{sdist.name} and {wheel.name}: as they should be")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} DIRECTORY")
    main(Path(sys.argv[1]).resolve())
