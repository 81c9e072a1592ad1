"""The benchmarks of the project, in one command: `python -m tests.bench`, from the checkout, on Linux.

Starts each server itself (servers.py), gives each the same work (load.py, rows.py), prints one table and,
with --output, writes it as Markdown. A column that cannot run, and a server that fails, say why in their
cells; the rest goes on. All of it takes half an hour; choose with --rows and --columns.

What is measured: the CPU time of the server, user and system, with all its processes, for a unit of work,
with server and client on the same core; and (`.../s`) how much work is done, with a core for each. The
columns take turns in each round, so that what disturbs the machine disturbs all alike; while one is measured
the other servers are stopped (SIGSTOP). A cell says the median of the rounds, the least and the most, and the
ratio to the first column: the median of the ratios within each round, which is what to compare.

What is not: the network, a disk (files lie in memory where that is possible), and what the kernel does for
a socket outside of a process. Memory is that of the processes, without the kernel's.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from . import report
from .processes import CannotRun, Failed
from .rows import ROWS, Row, Stand, enough_space, make_home
from .servers import COLUMNS

#: Where files lie in memory on Linux.
MEMORY = Path("/dev/shm")
#: Modes, as --same-core and --two-cores; True where server and client share a core.
MODES = (True, False)


def _certificate(directory: Path) -> str:
    """A certificate for the TLS rows, or "" if cryptography is not installed."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from support.cli import certificate

    try:
        return str(certificate(directory))
    except ImportError:
        return ""


class Run:
    """The whole measurement."""

    def __init__(self, options: argparse.Namespace, home: Path, tls: str) -> None:
        self._options, self._home, self._tls = options, home, tls
        cores = sorted(os.sched_getaffinity(0))
        self._cores = cores[0], cores[-1]
        self._modes = [mode for mode in MODES if mode in options.modes and (mode or len(cores) > 1)]

    def row(self, row: Row) -> dict[str, dict[str, report.Cell]]:
        """The lines of one row: title, column, cell."""
        stands: dict[str, Stand] = {}
        problems: dict[str, str] = {}
        rounds: dict[str, dict[str, list[float]]] = {}
        modes = [mode for mode in self._modes if row.alone or mode is self._modes[0]]
        try:
            for column in self._options.columns:
                try:
                    stands[column] = self._stand(row, column)
                    stands[column].pause()
                except (CannotRun, Failed) as error:
                    problems[column] = _problem(error)
            for _ in range(self._options.rounds):
                for mode in modes:
                    for column, stand in list(stands.items()):
                        try:
                            values = stand.measure(mode)
                            stand.pause()
                        except (CannotRun, Failed) as error:
                            problems[column] = _problem(error)
                            stands.pop(column).close()
                            continue
                        for title, value in values.items():
                            rounds.setdefault(title, {}).setdefault(column, []).append(value)
        finally:
            for stand in stands.values():
                stand.close()
        return {
            title: {each: problems.get(each) or cells[each] for each in self._options.columns}
            for title, cells in (rounds or {row.title: {}}).items()
        }

    def _stand(self, row: Row, column: str) -> Stand:
        if row.tls and not self._tls:
            raise CannotRun("cryptography, which makes the certificate, is not installed")
        # An address for each server: the ports that its transfers leave in TIME_WAIT are no other's trouble.
        host = f"127.{1 + ROWS.index(row)}.{1 + list(COLUMNS).index(column)}.1"
        return Stand(row, column, self._home, host, self._cores, self._tls, self._options.quick)


def _problem(error: Exception) -> str:
    text = " ".join(str(error).replace("|", "/").split())
    return text if isinstance(error, CannotRun) else f"failed: {text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    keys = [row.key for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=keys, default=keys, metavar="ROW", help=", ".join(keys))
    parser.add_argument(
        *("--columns", "-c"),
        nargs="+",
        choices=COLUMNS,
        default=list(COLUMNS),
        metavar="COLUMN",
        help=", ".join(f"'{column}'" for column in COLUMNS) + "; ratios are to the first",
    )
    parser.add_argument("--rounds", type=int, help="default 5; with --quick 1")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--same-core", dest="modes", action="store_const", const=[True], help="CPU time only")
    modes.add_argument("--two-cores", dest="modes", action="store_const", const=[False], help="work/s only")
    parser.add_argument("--quick", action="store_true", help="little work: shows that all runs, not how fast")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table there, too")
    parser.set_defaults(modes=MODES)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("this needs Linux: cores and CPU time are asked of its kernel")
    if options.rounds is None:
        options.rounds = 1 if options.quick else 5
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # nothing is left behind
    start = time.monotonic()
    in_memory = MEMORY.is_dir() and enough_space(MEMORY)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=MEMORY if in_memory else None) as name:
        make_home(Path(name), options.quick)
        with tempfile.TemporaryDirectory(prefix="bench-") as work:
            run = Run(options, Path(name), _certificate(Path(work)))
            lines: dict[str, dict[str, report.Cell]] = {}
            print(*report.table(options.columns, {}), sep="\n", flush=True)
            for row in ROWS:
                if row.key in options.rows:
                    found = run.row(row)
                    lines |= found
                    for title, cells in found.items():
                        print(report.row(title, list(cells.values())), flush=True)
    notes = [
        "",
        report.machine(),
        f"{options.rounds} round(s) in {(time.monotonic() - start) / 60:.0f} min,"
        f" {datetime.date.today()}; files in {'memory' if in_memory else 'the temporary directory'}."
        + (" With --quick: numbers of no meaning." if options.quick else ""),
    ]
    print(*notes, sep="\n")
    if options.output is not None:
        options.output.write_text("\n".join([*report.table(options.columns, lines), *notes, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
