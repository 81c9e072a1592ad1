"""What is printed: the table in Markdown, and the machine it was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from .servers import DAEMONS

#: Packages whose versions matter; those that are not installed are left out.
PACKAGES = ("pyftpdlib", "gevent", "greenlet", "pyOpenSSL", "aioftp")
#: Below this a base is noise, and a ratio to it says nothing: us, ms, kB, MB/s.
NOTHING = 0.05

#: The rounds of one line in one column, or why there are none.
Cell = list[float] | str


def _number(value: float) -> str:
    """Three digits that count, and no exponent."""
    magnitude = abs(value)
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2
    return f"{value:,.{digits}f}".replace(",", " ")


def _text(cell: Cell, base: Cell) -> str:
    """The median, the least to the most, and the median of the ratios within each round."""
    if isinstance(cell, str):
        return cell
    text = f"{_number(median(cell))} ({_number(min(cell))} to {_number(max(cell))})"
    if cell is not base and not isinstance(base, str) and median(base) > NOTHING:
        ratios = [value / first for value, first in zip(cell, base, strict=True) if first]
        text += f", x{median(ratios):.2f}"
    return text


def table(columns: Sequence[str], lines: dict[str, dict[str, Cell]]) -> Iterator[str]:
    """Markdown, line by line. Ratios are to the first of *columns* that has numbers in that line."""
    yield f"| median (least to most), ratio | {' | '.join(columns)} |"
    yield "|---" + "|---:" * len(columns) + "|"
    for title, cells in lines.items():
        yield row(title, [cells[column] for column in columns])


def row(title: str, cells: Sequence[Cell]) -> str:
    """One line of the table."""
    base = next((cell for cell in cells if not isinstance(cell, str)), "")
    return f"| {title} | {' | '.join(_text(cell, base) for cell in cells)} |"


def machine() -> str:
    """What it was measured on: no names of hosts, no paths."""
    parts = [f"{platform.python_implementation()} {platform.python_version()}"]
    for name in PACKAGES:
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    # vsftpd prints its version to its standard input: Debian is asked instead.
    for name, command in (
        ("vsftpd", ("dpkg-query", "--showformat=${Version}", "--show", "vsftpd")),
        ("pure-ftpd", ("pure-ftpd", "--help")),
    ):
        if version := re.search(r"\d[\d.]+", _said(*command)):
            parts.append(f"{name} {version[0]}")
    kernel = f"{platform.system()} {platform.release()}"
    return f"{_processor()}, {os.cpu_count()} cores, {kernel}; {', '.join(parts)}."


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def _said(*command: str) -> str:
    """What a program printed, or "" where there is none."""
    program = shutil.which(command[0], path=os.pathsep.join([os.environ.get("PATH", os.defpath), DAEMONS]))
    if program is None:
        return ""
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
