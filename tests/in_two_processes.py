"""`python tests/in_two_processes.py REPORTS [OPTION...]`: pytest, each process with every other file.

For `patch_all()`, which pytest-xdist does not stand. Each process writes its report into the directory
REPORTS; what the second has printed comes when the first has ended. Fails if one of them does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(reports: str, *options: str) -> int:
    """The worse one of the two exit codes."""
    tests = Path(__file__).parent
    files = sorted(str(path) for path in tests.rglob("test_*.py") if tests / "proof" not in path.parents)
    # This Python's, also where its environment is not activated. (Not `python -m pytest`, which would find
    # the package in the checkout first.)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    pytest = shutil.which("pytest", path=path) or sys.exit("in_two_processes.py: pytest is not installed")
    first, second = (
        subprocess.Popen(
            [pytest, *options, f"--junitxml={reports}/junit-{number}.xml", *files[number::2]],
            stdout=subprocess.PIPE if number else None,
            stderr=subprocess.STDOUT if number else None,
        )
        for number in (0, 1)
    )
    output, _ = second.communicate()  # while the first goes on printing
    code = first.wait()
    sys.stdout.buffer.write(output)
    sys.stdout.flush()
    return max(code, second.returncode)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
