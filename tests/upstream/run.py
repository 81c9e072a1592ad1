"""Run pyftpdlib's own test suite on GeventIOLoop, in every mode, and compare with pyftpdlib's own loop.

    python tests/upstream/run.py [--modes unpatched,libuv] [--keep] [--junit DIRECTORY]

It downloads the sdist of the pyftpdlib that is installed, takes the tests out of it and nothing else (the
pyftpdlib under test is the installed one), and runs them once for each mode, each in a fresh directory and
a process of its own; plugin.py, loaded there, does the rest. A line for each mode, then the comparison:
a test that passes on pyftpdlib's own loop must pass on ours, or be listed in exceptions.py.

The exit code is 1 if a test failed, a listed exception passed, a mode did not finish or collected nothing,
or the comparison found a difference.

Two modes run at a time. Each has a directory of its own, and upstream's tests take free ports and name
their files by process; what they need of the machine is time, see CIBUILDWHEEL below.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

#: Modes at a time.
WORKERS = 2
#: Seconds for one mode. Measured on 2 cores that were shared: 20 to 35.
MODE_TIMEOUT = 300
#: Seconds for one test before pytest prints the stacks of all threads.
TEST_TIMEOUT = 60
#: Seconds to write stacks, before a mode that did not finish is killed.
DUMP_TIMEOUT = 5
#: Lines of output shown of a mode that failed: the summary, a few tracebacks, or the stacks of a hang.
TAIL_LINES = 150


class Problem(Exception):
    """What keeps the suite from running: one line for the user."""


@dataclass(frozen=True)
class Mode:
    """How to run the suite, and the mode whose passing tests must pass in it."""

    upstream: str  # BRIDGE_UPSTREAM, see plugin.py
    loop: str = ""  # GEVENT_LOOP; "" is gevent's default
    reference: str = ""
    judged: bool = True  # failures count


MODES = {
    # Upstream does not support patch_all(): without epoll some tests are absent or skipped, and those of
    # MultiprocessFTPServer cannot be run (plugin.py). It only says what a patched process can pass.
    "own-patched": Mode("own-patched", judged=False),
    "own": Mode("own"),
    "unpatched": Mode("unpatched", reference="own"),
    "libuv": Mode("unpatched", loop="libuv", reference="own"),
    "patched": Mode("patched", reference="own-patched"),
    "libuv-patched": Mode("patched", loop="libuv", reference="own-patched"),
}


@dataclass
class Run:
    """What came of a mode."""

    name: str
    code: int | None = None  # pytest's exit code; None: it did not finish in time
    seconds: float = 0.0
    collected: list[str] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    imported: dict[str, str | None] = field(default_factory=dict)
    output: str = ""

    def tests(self, outcome: str) -> set[str]:
        """The node ids of the tests with *outcome*."""
        return {test for test, its in self.outcomes.items() if its == outcome}

    def ended(self) -> str:
        """How pytest ended, if not by itself: empty for 0 (passed) and 1 (tests failed)."""
        if self.code is None:
            return f"did not finish within {MODE_TIMEOUT} seconds"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return "" if self.code in (0, 1) else f"ended with pytest's exit code {self.code}"


# --- the tests


def sdist(version: str) -> Path:
    """Return the path of pyftpdlib's sdist: downloaded by pip, or there from an earlier run."""
    env_dir = os.environ.get("TOX_ENV_DIR")
    cache = Path(env_dir, "upstream") if env_dir else ROOT / ".cache" / "upstream"
    path = cache / f"pyftpdlib-{version}.tar.gz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            options = ["--quiet", "--no-deps", "--no-binary", "pyftpdlib", "--dest", partial]
            command = [sys.executable, "-m", "pip", "download", *options, f"pyftpdlib=={version}"]
            code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
            found = Path(partial, path.name)
            if code or not found.exists():
                raise Problem(f"pip could not download {path.name} (exit code {code})")
            found.replace(path)
    return path


def extract_tests(archive: Path, version: str, target: Path) -> None:
    """Write the regular files of the archive's tests folder into *target*/tests."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[:2] != (f"pyftpdlib-{version}", "tests") or ".." in parts or not member.isreg():
                continue
            content = tar.extractfile(member)
            assert content is not None  # (a regular file)
            path = target.joinpath(*parts[1:])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    if not (target / "tests" / "conftest.py").exists():
        raise Problem(f"{archive.name} holds no tests/conftest.py: has upstream moved its tests?")


# --- one mode


def environment(mode: Mode, outcomes: Path) -> dict[str, str]:
    """The environment of the suite's process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GEVENT", "PYTEST"))}
    if mode.loop:
        env["GEVENT_LOOP"] = mode.loop
    env["BRIDGE_UPSTREAM"] = mode.upstream
    env["BRIDGE_UPSTREAM_OUTCOMES"] = str(outcomes)
    # Upstream's own switch for machines that are slow or shared: its time limits are three times as long,
    # and TestFtpListingCmdsTLSMixin.test_nlst, which upstream marks "may fail on CI", is skipped. (It does:
    # on two busy cores in 4 of 6 runs with pyftpdlib's own loop, in 2 of 6 with ours. ftplib shuts down a
    # data connection whose TLS handshake has not ended, and the server thread left behind then breaks the
    # tests after it.) The same switch is set in every mode, so nothing is compared that differs by it.
    env["CIBUILDWHEEL"] = "1"
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.util.find_spec("bridge") is None:
        path.insert(1, str(ROOT))  # run by hand in an environment where bridge is not installed
    env["PYTHONPATH"] = os.pathsep.join(path)
    return env


def run_mode(name: str, directory: Path, junit: Path | None) -> Run:
    """Run the suite in *directory*, which holds its tests folder."""
    outcomes, log = directory / "outcomes.jsonl", directory / "output.txt"
    config = directory / "pytest.ini"
    config.write_text(f"[pytest]\nfaulthandler_timeout = {TEST_TIMEOUT}\n")
    options = ["-q", "--tb=short", "-p", "plugin", "-p", "no:cacheprovider", "-c", config.name]
    if junit and MODES[name].judged and MODES[name].reference:
        options += [f"--junitxml={junit / f'junit-{name}.xml'}"]
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", *options, "tests"]
    run = Run(name)
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment(MODES[name], outcomes),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its forked servers are ended with it
        )
        try:
            run.code = process.wait(MODE_TIMEOUT)
        except subprocess.TimeoutExpired:
            for number in (signal.SIGUSR1, signal.SIGABRT):  # greenlets (plugin.py), threads (faulthandler)
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(DUMP_TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left, as it should be
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    run.seconds = time.monotonic() - start
    run.output = log.read_text(errors="replace")
    if outcomes.exists():
        read_outcomes(run, outcomes)
    return run


def read_outcomes(run: Run, path: Path) -> None:
    """Read into *run* what plugin.py wrote."""
    rank = ("passed", "skipped", "xfailed", "failed")  # of a test's set-up, call and tear-down, the worst
    for line in path.read_text().splitlines():
        try:
            facts = json.loads(line)
        except ValueError:
            continue  # the last line of a process that was killed
        if "collected" in facts:
            run.collected = facts["collected"]
        elif "test" in facts:
            test, outcome = facts["test"], facts["outcome"]
            worst = max(run.outcomes.get(test, "passed"), outcome, key=rank.index)
            if facts["when"] != "setup" or worst != "passed":  # a set-up that passed is no test that did
                run.outcomes[test] = worst
        else:
            run.imported = facts


# --- the verdict


def faults(run: Run) -> list[str]:
    """What is wrong with a run, the comparison aside."""
    found = []
    for package in ("pyftpdlib", "bridge"):
        spec = importlib.util.find_spec(package)
        imported = run.imported.get(package)
        if spec and imported and imported != spec.origin:
            found.append(f"tested {package} from {imported}, not the installed one, {spec.origin}")
    if not run.collected:
        found.append("collected nothing")
    if not MODES[run.name].judged:
        return found
    if run.ended():
        found.append(run.ended())
    found += [f"failed: {test}" for test in sorted(run.tests("failed"))]
    found += [f"not run: {test}" for test in run.collected if test not in run.outcomes]
    if run.code and not found:
        found.append(f"pytest's exit code is {run.code}")
    return found


def differences(run: Run, reference: Run) -> list[str]:
    """What the reference runs or passes and *run* does not."""
    ours, theirs = set(run.collected), set(reference.collected)
    found = [f"collected only in {reference.name}: {test}" for test in sorted(theirs - ours)]
    found += [f"collected only in {run.name}: {test}" for test in sorted(ours - theirs)]
    for test in sorted(reference.tests("passed") - run.tests("passed") - run.tests("xfailed")):
        found.append(f"passes in {reference.name} only: {test} ({run.outcomes.get(test, 'not run')})")
    # The same from the other side, for a reference that did not come to its end.
    for test in sorted(run.tests("skipped") - reference.tests("skipped") - reference.tests("passed")):
        found.append(f"skipped in {run.name} only: {test}")
    return found


def print_row(run: Run) -> None:
    """Print the mode's line of the table."""
    count = Counter(run.outcomes.values())
    columns = (len(run.outcomes), *(count[name] for name in ("passed", "skipped", "xfailed", "failed")))
    numbers = "".join(f"{number:>9}" for number in columns)
    note = "" if MODES[run.name].judged else "  (failures do not count)"
    ended = f"  {run.ended()}" if run.ended() else ""
    print(f"{run.name:<14}{numbers}{run.seconds:>9.1f}{note}{ended}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the modes, print the table and what is wrong; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Run pyftpdlib's own test suite on GeventIOLoop and compare with pyftpdlib's own loop."
    )
    parser.add_argument(
        "--modes",
        default=",".join(MODES),
        help="comma-separated; what they are compared with runs too (default: %(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the directory of tests and full output")
    parser.add_argument("--junit", type=Path, metavar="DIRECTORY", help="write junit-MODE.xml files there")
    options = parser.parse_args(argv)
    wanted = set(filter(None, options.modes.split(",")))
    if not wanted or wanted - set(MODES):
        parser.error(f"--modes: {options.modes!r} is not a choice of {','.join(MODES)}")
    wanted |= {MODES[name].reference for name in wanted} - {""}
    junit = options.junit.resolve() if options.junit else None

    directory = Path(tempfile.mkdtemp(prefix="pyftpdlib-suite-"))
    try:
        return _run([name for name in MODES if name in wanted], directory, junit)
    except Problem as problem:
        print(f"{parser.prog}: error: {problem}", file=sys.stderr)
        return 1
    finally:
        if options.keep:
            print(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _run(names: list[str], directory: Path, junit: Path | None) -> int:
    version = importlib.metadata.version("pyftpdlib")
    archive = sdist(version)
    python, gevent = sys.version.split()[0], importlib.metadata.version("gevent")
    print(f"The test suite of pyftpdlib {version} on Python {python}, gevent {gevent}")
    header = "".join(f"{title:>9}" for title in ("ran", "passed", "skipped", "xfailed", "failed", "seconds"))
    print(f"{'mode':<14}{header}", flush=True)

    for name in names:
        (directory / name).mkdir()
        extract_tests(archive, version, directory / name)
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {name: pool.submit(run_mode, name, directory / name, junit) for name in names}
        for name in names:
            print_row(futures[name].result())
    runs = {name: future.result() for name, future in futures.items()}

    failed = False
    for name, run in runs.items():
        reference = MODES[name].reference
        wrong = faults(run)
        if reference:
            wrong += differences(run, runs[reference])
        for line in wrong:
            print(f"{name}: {line}")
        if wrong:
            failed = True
            tail = run.output.splitlines()[-TAIL_LINES:]
            print(f"--- {name}: the end of pytest's output", *tail, f"--- {name}: end", sep="\n")
        elif reference:
            theirs, ours = runs[reference].tests("passed"), run.tests("passed")
            print(
                f"{name}: has the {len(run.collected)} tests of {reference}; passes the {len(theirs)} that "
                f"pass there and {len(ours - theirs)} more; exceptions.py lists {len(run.tests('xfailed'))}"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
