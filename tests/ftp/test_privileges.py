"""--user and --chroot, as root on real processes: who serves then, what it may, and what it can still do.

`nobody` must be able to reach the files: they are in `open_path` (conftest.py).
"""

from __future__ import annotations

import contextlib
import datetime
import ftplib
import grp
import io
import os
import pwd
import re
import shutil
import signal
import ssl
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import bridge.ftp.command
from bridge.ftp.options import UsageError, parser_of
from support.cli import LIMIT, Command, certificate, run
from support.servers import held_ports

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]

CONCURRENCY = ("async", "pre-fork")
NOBODY = pwd.getpwnam("nobody")
GROUPS = sorted(os.getgrouplist("nobody", NOBODY.pw_gid))


@pytest.fixture
def jail(open_path: Path) -> Path:
    """A directory that everybody may enter, with `pub` that is nobody's; and a file beside `pub`."""
    (open_path / "outside.txt").write_text("outside")
    pub = open_path / "pub"
    pub.mkdir()
    (pub / "hello.txt").write_text("hello")
    os.chown(pub, NOBODY.pw_uid, NOBODY.pw_gid)
    return open_path


@contextlib.contextmanager
def log_in(server: Command) -> Iterator[ftplib.FTP]:
    with ftplib.FTP(timeout=LIMIT) as session:
        session.connect("127.0.0.1", server.port)
        session.login()
        yield session


def failure(directory: Path, *options: str) -> str:
    """The one line on stderr of a command that does not start."""
    result = run(sys.executable, "-m", "bridge.ftp", "-p", "0", *options, directory=directory)
    assert (result.returncode, result.stdout) == (2, ""), result
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("python -m bridge.ftp: error: ").strip()


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_nobody(pid: int) -> bool:
    now = status(pid)
    ids = (now["Uid"].split(), now["Gid"].split(), sorted(map(int, now["Groups"].split())))
    return (
        ids == ([str(NOBODY.pw_uid)] * 4, [str(NOBODY.pw_gid)] * 4, GROUPS)
        and now["CapPrm"] == now["CapEff"] == now["CapInh"] == "0" * 16
    )


# --- who serves


@pytest.mark.parametrize("chroot", [False, True], ids=["user", "chroot"])
@pytest.mark.parametrize("concurrency", CONCURRENCY)
def test_every_process_is_nobody_and_all_of_a_session_works(
    jail: Path, concurrency: str, chroot: bool
) -> None:
    """What is imported or opened late is there: dates, checksums, the monitor of the hub."""
    options = ["--chroot", str(jail)] if chroot else []
    with (
        Command(
            *("--user", "nobody", "-w", "--hash", "--concurrency", concurrency, *options),
            directory=jail / "pub",
        ) as server,
        log_in(server) as client,
    ):
        assert server.printed("^Runs as user nobody" + (f", in {re.escape(str(jail))}$" if chroot else "$"))
        pids = [server.pid, *(child.pid for child in server.children())]
        assert [pid for pid in pids if not is_nobody(pid)] == []
        assert client.nlst() == ["hello.txt"]
        client.storbinary("STOR new", io.BytesIO(b"content"))
        assert (jail / "pub" / "new").stat().st_uid == NOBODY.pw_uid
        client.sendcmd("MFMT 20200102030405 new")
        lines: list[str] = []
        client.retrlines("LIST", lines.append)
        assert len(lines) == 2
        assert "Jan 02  2020" in lines[1]
        client.sendcmd("OPTS MLST type;size;")
        assert client.sendcmd("HASH new").startswith("213 ")
        with pytest.raises(ftplib.error_perm, match=r"^550"):
            client.nlst("missing")
        client.quit()
        code, output = server.stop()
        assert code == 0, output
        assert "Traceback" not in output
        assert "Error" not in output


def test_a_group_may_be_named(jail: Path) -> None:
    group = grp.getgrnam("daemon").gr_gid
    with Command("--user", "nobody:daemon", directory=jail / "pub") as server:
        now = status(server.pid)
        assert (now["Gid"].split(), now["Groups"].split()) == ([str(group)] * 4, [str(group)])


def test_a_port_that_is_roots_is_bound_first(jail: Path) -> None:
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(held_ports(1, among=range(600, 1024)))
        options = ("--user", "nobody", "-i", "127.0.0.1", "-p", str(port))
        server = stack.enter_context(Command(*options, directory=jail / "pub"))
        assert server.port == port
        assert is_nobody(server.pid)
        with log_in(server) as client:
            assert client.nlst() == ["hello.txt"]


def test_files_that_only_root_may_read_are_read_before(jail: Path) -> None:
    pytest.importorskip("OpenSSL")
    pem = certificate(jail)
    pem.chmod(0o600)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pem)
    for options in ([], ["--chroot", str(jail / "pub")]):
        with Command(
            "--user", "nobody", "--tls", "--certfile", str(pem), *options, directory=jail / "pub"
        ) as server:
            with ftplib.FTP_TLS(timeout=LIMIT, context=context) as client:
                client.connect("localhost", server.port)
                client.login()
                client.prot_p()
                assert client.nlst() == ["hello.txt"]


# --- what it may still do

#: Tries, when somebody logs in, what must not be possible any more.
CURIOUS = r"""
import importlib, os, sys
import bridge.ftp.command
from pyftpdlib.handlers import FTPHandler

sys.path.insert(0, "/modules")
TRIES = {
    "setuid": lambda: os.setuid(0),
    "seteuid": lambda: os.seteuid(0),
    "setgid": lambda: os.setgid(0),
    "setgroups": lambda: os.setgroups([0]),
    "chroot": lambda: os.chroot("/"),
    "import": lambda: importlib.import_module("found_in_the_chroot"),
}

def on_login(self, username):
    for name, attempt in TRIES.items():
        try:
            attempt()
            result = "done"
        except Exception as error:
            result = type(error).__name__
        print(f"{name}: {result}", flush=True)
    print("cwd:", os.getcwd(), flush=True)

FTPHandler.on_login = on_login
sys.exit(bridge.ftp.main())
"""


def test_root_cannot_be_had_again_and_nothing_is_imported_from_the_chroot(jail: Path) -> None:
    (jail / "modules").mkdir()
    (jail / "modules" / "found_in_the_chroot.py").touch()
    options = ["--user", "nobody", "--chroot", str(jail)]
    with Command(*options, program=["-c", CURIOUS], directory=jail / "pub") as server, log_in(server):
        for name in ("setuid", "seteuid", "setgid", "setgroups", "chroot"):
            assert server.printed(f"^{name}: ") == f"{name}: PermissionError\n"
        assert server.printed("^import: ") == "import: ModuleNotFoundError\n"
        assert server.printed("^cwd: ") == "cwd: /\n"
        assert os.readlink(f"/proc/{server.pid}/root") == str(jail)


BLOCKING = r"""
import sys, time
import bridge.ftp.command
from pyftpdlib.handlers import FTPHandler

FTPHandler.on_login = lambda self, username: time.sleep(0.5)  # five times --max-blocking-time
sys.exit(bridge.ftp.main())
"""


def test_what_blocks_the_hub_is_still_named(jail: Path) -> None:
    """By gevent's monitor, which imports a good deal when it has something to say."""
    options = ["--user", "nobody", "--chroot", str(jail)]
    with (
        Command(*options, program=["-c", BLOCKING], directory=jail / "pub") as server,
        log_in(server) as client,
    ):
        server.logged("blocks the hub for more than 0.1 s")
        client.quit()
        code, output = server.stop()
        assert code == 0, output
        assert "Traceback" not in output


def test_the_start_says_the_path_of_outside(jail: Path) -> None:
    with Command("--user", "nobody", "--chroot", str(jail), directory=jail / "pub") as server:
        assert server.stdout.startswith(f"Serving {jail}/pub (read-only)")


ZONE = Path("/usr/share/zoneinfo/Asia/Tokyo")


@pytest.mark.skipif(not ZONE.exists(), reason="needs tzdata")
def test_the_time_zone_of_outside_holds(jail: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    noon = datetime.datetime(2020, 1, 2, 12, tzinfo=datetime.timezone.utc).timestamp()
    os.utime(jail / "pub" / "hello.txt", (noon, noon))
    options = ["--user", "nobody", "--chroot", str(jail), "--use-localtime"]
    with Command(*options, directory=jail / "pub") as server, log_in(server) as client:
        assert client.sendcmd("MDTM hello.txt") == "213 20200102210000"


def test_a_signal_still_drains_it(jail: Path) -> None:
    with Command("--user", "nobody", "--chroot", str(jail), directory=jail / "pub") as server:
        with pytest.raises(ftplib.error_temp, match=r"^421 Service shutting down"), log_in(server):
            code, output = server.stop(signal.SIGINT)
        assert code == 0, output


# --- errors

#: As nobody from the start. (A Python of root's own is out of nobody's reach, so not by executing it.)
UNPRIVILEGED = f"""
import os, sys
import bridge.ftp.command
bridge.ftp.main(["--check"])  # imports what it needs
os.setresuid({NOBODY.pw_uid}, {NOBODY.pw_uid}, {NOBODY.pw_uid})
sys.exit(bridge.ftp.main(["-p", "0", "--user", "daemon"]))
"""


def test_only_root_may(jail: Path) -> None:
    result = run(sys.executable, "-c", UNPRIVILEGED, directory=jail / "pub")
    assert result.returncode == 2
    assert result.stderr == (
        "python -m bridge.ftp: error: --user: only root can become another user; "
        "start as root or leave --user out\n"
    )


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
@pytest.mark.parametrize("capability", ["setuid", "setgid", "sys_chroot"])
def test_a_root_that_may_not_is_an_error(jail: Path, capability: str) -> None:
    """In a container, say."""
    command = ["setpriv", f"--bounding-set=-{capability}", sys.executable, "-m", "bridge.ftp", "-p", "0"]
    result = run(*command, "--user", "nobody", "--chroot", str(jail), directory=jail / "pub")
    assert (result.returncode, result.stdout) == (2, ""), result
    assert result.stderr.splitlines()[-1] == (
        "python -m bridge.ftp: error: --user/--chroot: Operation not permitted; "
        "root needs CAP_SETUID and CAP_SETGID, for --chroot CAP_SYS_CHROOT"
    )
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--user", "no-such-user"], "--user: there is no user 'no-such-user' in the user database"),
        (["--user", "nobody:no-such"], "--user: there is no group 'no-such' in the group database"),
        (["--user", "nobody:"], "--user: there is no group '' in the group database"),
        (["--user", ""], "--user: there is no user '' in the user database"),
        (["--user", "root"], "--user: root is root; name an ordinary user or leave --user out"),
        (["--chroot", "."], "--chroot needs --user: root can leave a chroot"),
        (["--user", "nobody", "--chroot", "nowhere"], "--chroot: 'nowhere' is not a directory"),
        (["--user", "nobody", "--chroot", "hello.txt"], "--chroot: 'hello.txt' is not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(jail: Path, options: list[str], expected: str) -> None:
    assert failure(jail / "pub", *options) == expected


def test_the_directory_must_lie_in_the_chroot(jail: Path) -> None:
    pub, public = str(jail / "pub"), str(jail / "public")
    os.mkdir(public)  # its name begins with that of the chroot
    message = failure(jail, "--user", "nobody", "--chroot", "pub", "-d", "public")
    assert message == f"--chroot: --directory {public!r} is not in {pub!r}; choose one above it"


def test_the_homes_of_users_must_lie_in_the_chroot(jail: Path) -> None:
    argv = ["--user", "nobody", "--chroot", str(jail), "-d", str(jail / "pub")]
    site = bridge.ftp.command.application_of(parser_of(bridge.ftp.command.PARTS).parse_args(argv))
    site.authorizer.add_user("ada", "lovelace", "/")
    with pytest.raises(UsageError) as caught:
        site.prepare()
    assert str(caught.value) == f"--chroot: the home '/' is not in {str(jail)!r}; choose one above it"


def test_the_user_must_be_able_to_read_the_directory(jail: Path) -> None:
    closed = str(jail / "closed")
    os.mkdir(closed, 0o700)
    message = failure(jail, "--user", "nobody", "-d", "closed")
    assert message == (f"--user: nobody cannot read {closed!r}: Permission denied; change its owner or mode")


def test_the_user_must_be_able_to_write_to_the_directory(jail: Path) -> None:
    message = failure(jail, "--user", "nobody", "-w")
    assert message == f"--user: nobody cannot write to {str(jail)!r}; change its owner or mode"


def test_check_drops_nothing_but_says_what_is_wrong(jail: Path) -> None:
    result = run(sys.executable, "-m", "bridge.ftp", "--check", "--user", "nobody", directory=jail)
    assert (result.returncode, result.stderr) == (0, "")
    assert "no-such-user" in failure(jail, "--check", "--user", "no-such-user")


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]], ids=["one process", "workers"])
def test_metrics_and_page_in_a_chroot(jail: Path, workers: list[str]) -> None:
    """There is no /proc, so descriptors and memory are not known."""
    options = ("--user", "nobody", "--chroot", str(jail), "--http", "0", *workers)
    with Command(*options, directory=jail / "pub") as server, log_in(server) as client:
        assert client.nlst() == ["hello.txt"]
        url = server.printed("^Status: ").split()[-1]
        with urllib.request.urlopen(f"{url}metrics", timeout=LIMIT) as response:
            metrics = response.read().decode()
        assert re.search(r"^bridge_worker_cpu_seconds_total\{.*\} 0\.\d", metrics, re.MULTILINE)
        assert not re.search(r"^bridge_resident_memory_bytes ", metrics, re.MULTILINE)
        with urllib.request.urlopen(url, timeout=LIMIT) as response:
            assert ">unknown<" in response.read().decode()
        client.quit()
        code, output = server.stop()
        assert code == 0, output
        assert "Traceback" not in output
