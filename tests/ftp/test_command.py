"""The quickstart: `python -m bridge.ftp` as a process, through its streams, signals, exit code and FTP.

What its options mean is pyftpdlib's business; that each of them arrives is tested here, and that the names
are those of `python -m pyftpdlib`. File transfers by real clients are in test_clients.py.
"""

from __future__ import annotations

import ftplib
import io
import os
import re
import shlex
import signal
import socket
import ssl
import sys
from argparse import Namespace
from pathlib import Path

import psutil
import pyftpdlib.__main__
import pytest
from pyftpdlib import servers
from pyftpdlib.handlers import DTPHandler, FTPHandler

import bridge.ftp.command
from bridge.ftp.options import parser_of
from bridge.ftp.parts.workers import cores
from support.cli import LIMIT, Command, certificate, connect, failure, log_in, run, tls_client
from support.servers import held_ports

pytestmark = pytest.mark.program

CONCURRENCY = ("async", "pre-fork")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def read(client: ftplib.FTP, name: str) -> bytes:
    parts: list[bytes] = []
    client.retrbinary(f"RETR {name}", parts.append)
    return b"".join(parts)


# --- what it does without options


def test_without_options_it_shares_the_current_directory_with_anonymous(tmp_path: Path) -> None:
    (tmp_path / "hello.txt").write_bytes(b"hello")
    with Command(directory=tmp_path) as server, log_in(server) as client:
        assert client.nlst() == ["hello.txt"]
        assert read(client, "hello.txt") == b"hello"


@pytest.mark.parametrize(
    "command", ["STOR new", "APPE hello.txt", "DELE hello.txt", "MKD new", "RNFR hello.txt"]
)
def test_without_options_nothing_can_be_changed(tmp_path: Path, command: str) -> None:
    (tmp_path / "hello.txt").write_bytes(b"hello")
    with Command(directory=tmp_path) as server, log_in(server) as client:
        with pytest.raises(ftplib.error_perm, match=r"^550 Not enough privileges"):
            client.sendcmd(command)
        assert client.nlst() == ["hello.txt"]


def test_it_announces_where_it_listens_how_to_connect_and_how_to_stop(tmp_path: Path) -> None:
    with Command(directory=tmp_path) as server:
        ready(server, "async")
        assert server.stop()[0] == 0
        assert server.stdout == (
            f"Serving {tmp_path} (read-only) to anonymous on 0.0.0.0 port {server.port}\n"
            f"Connect:  curl ftp://localhost:{server.port}/\n"
            f"Stop:     Ctrl-C\n"
        )


def test_it_logs_sessions_logins_and_transfers_to_stderr_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "hello.txt").write_bytes(b"hello")
    with Command(directory=tmp_path) as server:
        with log_in(server) as client:
            read(client, "hello.txt")
        server.logged("FTP session closed")
        server.stop()
        lines = server.stderr.splitlines()
        peer = r"127\.0\.0\.1:\d+"
        for expected in (
            rf">>> starting FTP server on 0\.0\.0\.0:{server.port}, pid={server.pid} <<<",
            rf"{peer}-\[\] FTP session opened \(connect\)",
            rf"{peer}-\[anonymous\] USER 'anonymous' logged in\.",
            rf"{peer}-\[anonymous\] RETR {re.escape(str(tmp_path))}/hello\.txt"
            r" completed=1 bytes=5 seconds=\d+\.\d+",
            rf"{peer}-\[anonymous\] FTP session closed \(disconnect\)\.",
            rf">>> shutting down FTP server on 0\.0\.0\.0:{server.port}, pid={server.pid} <<<",
        ):
            assert [line for line in lines if re.search(expected + "$", line)], server.stderr
        for line in lines:
            assert re.match(r"\[I \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \S", line), server.stderr


# --- options


def test_write_lets_files_be_uploaded_renamed_and_deleted(tmp_path: Path) -> None:
    with Command("-w", directory=tmp_path) as server, log_in(server) as client:
        assert "(writable)" in server.stdout
        client.storbinary("STOR new", io.BytesIO(b"content"))
        assert (tmp_path / "new").read_bytes() == b"content"
        client.rename("new", "newer")
        assert (tmp_path / "newer").read_bytes() == b"content"
        client.delete("newer")
        assert list(tmp_path.iterdir()) == []


def test_a_user_with_a_password_gets_in_and_anonymous_does_not(tmp_path: Path) -> None:
    with Command("-u", "ada", "-P", "lovelace", directory=tmp_path) as server:
        assert " to ada on " in server.stdout
        with connect(server) as client:
            with pytest.raises(ftplib.error_perm, match=r"^530 Anonymous access not allowed\.$"):
                client.login()
            client.login("ada", "lovelace")  # by default there are more attempts than one
            assert client.pwd() == "/"


def test_the_password_is_neither_announced_nor_logged(tmp_path: Path) -> None:
    with Command("-u", "ada", "-P", "lovelace", "-D", directory=tmp_path) as server:
        with log_in(server, "ada", "lovelace"):
            pass
        _, output = server.stop()
        assert "USER 'ada' logged in." in output
        assert "lovelace" not in output


def test_directory_is_shared_instead_of_the_current_one(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "inside").touch()
    with Command("-d", "shared", directory=tmp_path) as server, log_in(server) as client:
        assert client.nlst() == ["inside"]
        assert server.stdout.startswith(f"Serving {tmp_path}/shared (read-only)")


def test_interface_is_the_one_address_it_listens_on(tmp_path: Path) -> None:
    with held_ports(1, "127.0.0.1", "127.0.0.2") as port:  # so nobody listens on the first of them
        with Command("-i", "127.0.0.2", "-p", str(port), directory=tmp_path) as server:
            assert (server.host, server.port) == ("127.0.0.2", port)
            with pytest.raises(ConnectionRefusedError):
                connect(server)


def passive_port(reply: str) -> int:
    return ftplib.parse227(reply)[1]


def test_range_is_where_passive_ports_are_taken_from(tmp_path: Path) -> None:
    # Below what the kernel gives out by itself (32768 and up), so that a PASV without the option misses it.
    with Command("-r", "20000-20999", directory=tmp_path) as server, log_in(server) as client:
        ports = [passive_port(client.sendcmd("PASV")) for _ in range(5)]
        assert all(20000 <= port <= 20999 for port in ports), ports
        assert 20000 <= ftplib.parse229(client.sendcmd("EPSV"), ("127.0.0.1", server.port))[1] <= 20999


def test_nat_address_is_what_pasv_tells(tmp_path: Path) -> None:
    with Command("-n", "192.0.2.1", directory=tmp_path) as server, log_in(server) as client:
        assert ftplib.parse227(client.sendcmd("PASV"))[0] == "192.0.2.1"


def test_without_nat_address_pasv_tells_the_address_of_the_control_connection(tmp_path: Path) -> None:
    with Command(directory=tmp_path) as server, log_in(server) as client:
        assert ftplib.parse227(client.sendcmd("PASV"))[0] == "127.0.0.1"


def test_debug_logs_commands_and_replies(tmp_path: Path) -> None:
    with Command("-D", directory=tmp_path) as server:
        with log_in(server) as client:
            client.voidcmd("NOOP")
        server.stop()
        assert re.search(r"<- NOOP\b", server.stderr)
        assert re.search(r"-> 200 ", server.stderr)


def test_without_debug_commands_are_not_logged(tmp_path: Path) -> None:
    with Command(directory=tmp_path) as server:
        with log_in(server) as client:
            client.voidcmd("NOOP")
        server.stop()
        assert "NOOP" not in server.stderr


def test_banner_is_the_greeting(tmp_path: Path) -> None:
    with Command("--banner", "come in", directory=tmp_path) as server, connect(server) as client:
        assert client.getwelcome() == "220 come in"


@pytest.mark.parametrize(
    ("options", "sent"),
    [(["--encoding", "latin-1"], b"caf\xe9.txt\r\n"), ([], b"caf\xc3\xa9.txt\r\n")],
    ids=["latin-1", "default"],
)
def test_encoding_is_that_of_names_on_the_wire(tmp_path: Path, options: list[str], sent: bytes) -> None:
    (tmp_path / os.fsdecode("café.txt".encode())).write_bytes(b"coffee")  # UTF-8, as for the program
    encoding = options[-1] if options else "utf-8"
    with Command(*options, directory=tmp_path) as server, log_in(server, encoding=encoding) as client:
        with client.transfercmd("NLST") as data:
            received = data.makefile("rb").read()
        client.voidresp()
        assert received == sent
        assert read(client, "café.txt") == b"coffee"


def test_timeout_ends_an_idle_session_with_421(tmp_path: Path) -> None:
    with (
        Command("--timeout", "1", directory=tmp_path) as server,
        connect(server) as client,
        pytest.raises(ftplib.error_temp, match=r"^421 Control connection timed out"),
    ):
        client.getresp()


def test_timeout_ends_a_stalled_transfer_with_421(tmp_path: Path) -> None:
    with (
        Command("-w", "--timeout", "1", directory=tmp_path) as server,
        log_in(server) as client,
        client.transfercmd("STOR new"),
        pytest.raises(ftplib.error_temp, match=r"^421 Data connection"),
    ):
        client.getresp()


def test_max_cons_per_ip_refuses_one_session_more_with_421(tmp_path: Path) -> None:
    with Command("--max-cons-per-ip", "1", directory=tmp_path) as server:
        with log_in(server) as client:
            with pytest.raises(ftplib.error_temp, match=r"^421 Too many connections from the same IP"):
                connect(server)
            assert client.pwd() == "/"
        server.logged("FTP session closed", 2)
        with log_in(server) as client:
            assert client.pwd() == "/"


def test_by_default_sessions_of_one_address_are_not_limited(tmp_path: Path) -> None:
    with Command(directory=tmp_path) as server, log_in(server) as one, log_in(server) as two:
        assert one.pwd() == two.pwd() == "/"


def test_max_cons_refuses_one_session_more_with_421(tmp_path: Path) -> None:
    with Command("--max-cons", "1", directory=tmp_path) as server, log_in(server) as client:
        with pytest.raises(ftplib.error_temp, match=r"^421 Too many connections"):
            connect(server)
        assert client.pwd() == "/"


def test_max_login_attempts_ends_the_session(tmp_path: Path) -> None:
    options = ["--max-login-attempts", "1", "-u", "ada", "-P", "lovelace"]
    with Command(*options, directory=tmp_path) as server, connect(server) as client:
        with pytest.raises(ftplib.error_perm, match=r"^530 .*Disconnecting"):
            client.login("ada", "byron")
        with pytest.raises((EOFError, ConnectionError)):
            client.pwd()


# --- TLS


@pytest.fixture
def pem(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a certificate with its key; skips without pyOpenSSL."""
    pytest.importorskip("OpenSSL")
    return str(certificate(tmp_path_factory.mktemp("tls")))


def test_tls_protects_commands_and_data_of_clients_who_ask(tmp_path: Path, pem: str) -> None:
    content = os.urandom(1 << 20)
    with Command("-w", "--tls", "--certfile", pem, directory=tmp_path) as server:
        server.printed(rf"curl --ssl-reqd -k ftp://localhost:{server.port}/$")
        with tls_client(server) as client:
            client.login()  # AUTH TLS first
            client.prot_p()
            assert isinstance(client.sock, ssl.SSLSocket)
            client.storbinary("STOR new", io.BytesIO(content))
            assert (tmp_path / "new").read_bytes() == content
            assert read(client, "new") == content
            assert client.nlst() == ["new"]
        with log_in(server) as plain:
            assert read(plain, "new") == content


def test_tls_takes_the_key_from_a_file_of_its_own(tmp_path: Path, pem: str) -> None:
    key, middle, chain = Path(pem).read_text().partition("-----BEGIN CERTIFICATE-----")
    (tmp_path / "key.pem").write_text(key)
    (tmp_path / "chain.pem").write_text(middle + chain)
    options = ["--tls", "--certfile", "chain.pem", "--keyfile", "key.pem"]
    with Command(*options, directory=tmp_path) as server, tls_client(server) as client:
        client.login()
        assert client.pwd() == "/"


def test_tls_control_required_refuses_a_login_in_the_clear(tmp_path: Path, pem: str) -> None:
    options = ["--tls", "--certfile", pem, "--tls-control-required"]
    with Command(*options, directory=tmp_path) as server:
        with pytest.raises(ftplib.error_perm, match=r"^550 .*TLS required on the control"):
            log_in(server)
        with tls_client(server) as client:
            client.login()
            assert client.nlst() == []  # data in the clear is not forbidden


def test_tls_data_required_refuses_data_in_the_clear(tmp_path: Path, pem: str) -> None:
    (tmp_path / "hello.txt").touch()
    options = ["--tls", "--certfile", pem, "--tls-data-required"]
    with Command(*options, directory=tmp_path) as server, tls_client(server) as client:
        client.login()
        with pytest.raises(ftplib.error_perm, match=r"^550 .*TLS required on the data"):
            client.sendcmd("PASV")
        client.prot_p()
        assert client.nlst() == ["hello.txt"]


# --- options are pyftpdlib's, and set on classes of ours


def test_options_do_not_change_the_classes_of_pyftpdlib(pem: str) -> None:
    from pyftpdlib.handlers import TLS_DTPHandler, TLS_FTPHandler

    classes = [
        *(FTPHandler, DTPHandler, TLS_FTPHandler, TLS_DTPHandler),
        *(servers.FTPServer, servers.ThreadedFTPServer, servers.MultiprocessFTPServer),
    ]
    before = [dict(vars(cls)) for cls in classes]
    argv = ["-n", "192.0.2.1", "-r", "20000-20999", "--timeout", "1", "--banner", "hi"]
    argv += ["--permit-foreign-addresses", "--permit-privileged-ports", "--encoding", "latin-1"]
    argv += ["--use-localtime", "--disable-sendfile", "--max-login-attempts", "1"]
    tls = ["--tls", "--certfile", pem, "--tls-control-required", "--tls-data-required"]
    for options in (argv, argv + tls):
        site = bridge.ftp.command.application_of(
            parser_of(bridge.ftp.command.PARTS).parse_args([*options, "-p", "0"])
        )
        site.bind()
        site.close()
        handler = site.handler
        assert handler.authorizer is site.authorizer
        assert handler.masquerade_address == "192.0.2.1"
        assert handler.passive_ports == list(range(20000, 21000))
        assert handler.timeout == handler.dtp_handler.timeout == 1
        assert handler.banner == "hi"
        assert handler.permit_foreign_addresses is handler.permit_privileged_ports is True
        assert handler.encoding == "latin-1"
        assert handler.use_gmt_times is handler.use_sendfile is False
        assert handler.max_login_attempts == 1
        assert getattr(handler, "tls_control_required", None) is (True if "--tls" in options else None)
        assert getattr(handler, "tls_data_required", None) is (True if "--tls" in options else None)
    assert [dict(vars(cls)) for cls in classes] == before


#: Options pyftpdlib does not have.
OURS = {"--hash", "--stop-timeout", "--long-wait", "--max-blocking-time", "--atomic-uploads"}
OURS = {"--hash", "--stop-timeout", "--long-wait", "--max-blocking-time", "--atomic-uploads"}
OURS |= {"--config", "--check", "--print-config", "--user", "--chroot", "--workers"}
OURS |= {"--proxy-protocol", "--masquerade", "--passive-ports"}
OURS |= {"--users", "--anonymous", "--ban"}
OURS |= {"--http", "--http-admin"}
OURS |= {"--tls-required", "--require-session-reuse", "--client-ca", "--tls-max"}
OURS |= {"--log-format", "--log-file", "--xferlog", "--quiet"}


def option_names(help_text: str) -> set[str]:
    return set(re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*(?=[,\s])", help_text))


def test_it_has_every_option_of_pyftpdlib(tmp_path: Path) -> None:
    theirs = option_names(run(sys.executable, "-m", "pyftpdlib", "--help", directory=tmp_path).stdout)
    ours = option_names(run(sys.executable, "-m", "bridge.ftp", "--help", directory=tmp_path).stdout)
    assert {"-w", "--max-login-attempts", "--tls"} < theirs
    assert theirs <= ours
    assert ours - theirs == {"--version", *OURS}


#: Any file.
THIS = shlex.quote(__file__)
SAMPLES = (
    *("-i ::1", "--interface ::1", "-p 99", "--port 0", "-w", "--write", "-d /tmp", "--directory /tmp"),
    *("-n 192.0.2.1", "--nat-address 192.0.2.1", "-r 8000-8003", "--range 8000-8003", "-D", "--debug"),
    *("-u ada", "--username ada", "-P secret", "--password secret", "--tls", "--tls-control-required"),
    *(f"--certfile {THIS}", f"--keyfile {THIS}", "--tls-data-required", "--timeout 7", "--timeout 0"),
    *("--banner hello", "--permit-foreign-addresses", "--permit-privileged-ports", "--encoding latin-1"),
    *("--use-localtime", "--disable-sendfile", "--max-cons 0", "--max-cons 9", "--max-cons-per-ip 9"),
    "--max-login-attempts 9",
)


def parsed(options: Namespace) -> dict[str, object]:
    """What was chosen, without the three defaults that differ in form (their classes, an absolute path)
    or are a slip of pyftpdlib's (--max-cons-per-ip: 512, where its help says unlimited)."""
    values = vars(options)
    for name in ["--concurrency", *OURS]:
        values.pop(name[2:].replace("-", "_"), None)
    if values["directory"] in (os.curdir, os.getcwd()):
        del values["directory"]
    values["tls"] = bool(values["tls"])  # its mode
    if values["max_cons_per_ip"] in (0, 512):
        del values["max_cons_per_ip"]
    return values


@pytest.mark.parametrize("argv", ["", *SAMPLES])
def test_an_option_means_what_it_means_to_pyftpdlib(argv: str) -> None:
    theirs = parsed(pyftpdlib.__main__.parse_args(shlex.split(argv)))
    assert parsed(parser_of(bridge.ftp.command.PARTS).parse_args(shlex.split(argv))) == theirs


def test_version_tells_the_version_of_bridge() -> None:
    result = run(sys.executable, "-m", "bridge.ftp", "--version")
    assert (result.returncode, result.stdout) == (0, f"bridge {bridge.__version__}\n")


# --- errors


def usage_failure(directory: Path, *options: str) -> str:
    """The last line on stderr of a command whose options cannot be parsed; argparse puts usage before it."""
    result = run(sys.executable, "-m", "bridge.ftp", *options, directory=directory)
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    prefix = "python -m bridge.ftp: error: "
    last = result.stderr.splitlines()[-1]
    assert last.startswith(prefix), result.stderr
    return last.removeprefix(prefix)


def test_a_directory_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "--directory: 'file' is not a directory" in failure(tmp_path, "-d", "file")


def test_a_directory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    assert "--directory: 'nowhere' is not a directory" in failure(tmp_path, "-d", "nowhere")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every directory")
def test_a_directory_without_permission_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    assert "--directory: cannot read 'closed': Permission denied" in failure(tmp_path, "-d", "closed")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every directory")
def test_write_to_a_directory_one_may_only_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "fixed").mkdir(mode=0o500)
    assert "--write: cannot write to 'fixed'" in failure(tmp_path, "-w", "-d", "fixed")


def test_a_port_in_use_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = failure(tmp_path, "-i", "127.0.0.1", "-p", str(port))
    assert "--port" in message
    assert f"127.0.0.1, port {port}: Address already in use" in message


def test_an_interface_this_machine_does_not_have_is_an_error(tmp_path: Path) -> None:
    message = failure(tmp_path, "-i", "192.0.2.1")
    assert "--interface" in message
    assert "192.0.2.1" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tls", "--certfile", "missing.pem"], "--certfile: cannot read 'missing.pem'"),
        (["--tls", "--certfile", "not.pem"], "--certfile: no certificate, PEM, in 'not.pem'"),
        (["--tls", "--keyfile", "not.pem"], "--keyfile needs --certfile"),
        (["--certfile", "not.pem"], "--certfile needs --tls"),
        (["--keyfile", "not.pem"], "--keyfile needs --tls"),
        (["--tls-control-required"], "--tls-control-required needs --tls"),
        (["--tls-data-required"], "--tls-data-required needs --tls"),
        (["--tls-required"], "--tls-required needs --tls"),
        (["--require-session-reuse"], "--require-session-reuse needs --tls"),
        (["--client-ca", "not.pem"], "--client-ca needs --tls"),
        (["--username", "ada"], "--username needs --password"),
        (["--password", "lovelace"], "--password needs --username"),
        (["--nat-address", "no such name"], "--nat-address: 'no such name'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_combinations_are_errors_that_name_the_option(
    tmp_path: Path, options: list[str], expected: str
) -> None:
    if "--tls" in options:
        pytest.importorskip("OpenSSL")
    (tmp_path / "not.pem").write_text("this is not PEM\n")
    assert expected in failure(tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-p", "65536"], "argument -p/--port: port 65536 is not between 0"),
        (["-p", "-1"], "argument -p/--port: "),
        (["-p", "ftp"], "argument -p/--port: 'ftp' is no port number"),
        (["-r", "9000-8000"], "argument -r/--range: '9000-8000' does not rise"),
        (["-r", "8000"], "argument -r/--range: '8000' is no range"),
        (["-r", "0-10"], "argument -r/--range: '0-10' does not rise"),
        (["-r", "1-65536"], "argument -r/--range: '1-65536' does not rise"),
        (["--encoding", "klingon"], "argument --encoding: unknown encoding 'klingon'"),
        (["--timeout", "-1"], "argument --timeout: "),
        (["--timeout", "soon"], "argument --timeout: 'soon' is no number"),
        (["--max-cons", "-1"], "argument --max-cons: "),
        (["--concurrency", "none"], "argument --concurrency: invalid choice: 'none'"),
        (
            ["--concurrency", "multi-thread"],
            "argument --concurrency: multi-thread is not offered here; "
            "use `python -m pyftpdlib --concurrency multi-thread`",
        ),
        (["--concurrency", "multi-proc"], "argument --concurrency: multi-proc is not offered here; use"),
        (["--tls", "starttls"], "argument --tls: invalid choice: 'starttls'"),
        (["directory"], "unrecognized arguments: directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values_are_errors_that_name_the_option(
    tmp_path: Path, options: list[str], expected: str
) -> None:
    assert usage_failure(tmp_path, *options).startswith(expected)


# --- signals

#: Child processes of a pre-forked server. On one core it has no other process.
CHILDREN = cores() if cores() > 1 else 0
needs_cores = pytest.mark.skipif(cores() < 2, reason="on one core pre-fork is one process")


def ready(server: Command, concurrency: str) -> list[psutil.Process]:
    """Its child processes, once every process serves."""
    processes = cores() if concurrency == "pre-fork" else 1
    server.logged(r"\] passive ports: ", processes)
    children = server.children()
    assert len(children) == (CHILDREN if concurrency == "pre-fork" else 0)
    return children


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and not zombie(process)]


def zombie(process: psutil.Process) -> bool:
    """Whether it is dead and only its (foreign) parent, who has yet to reap it, still sees it."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("concurrency", CONCURRENCY)
def test_a_signal_ends_it_with_0_and_all_its_processes(
    tmp_path: Path, concurrency: str, number: signal.Signals
) -> None:
    with Command("--concurrency", concurrency, directory=tmp_path) as server:
        children = ready(server, concurrency)
        server.send(number)
        server.exit_code()
        assert alive(children) == []
        code, output = server.wait()
        assert code == 0, output
        assert "Traceback" not in output


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("concurrency", CONCURRENCY)
def test_a_signal_ends_it_also_while_a_client_is_connected(
    tmp_path: Path, concurrency: str, number: signal.Signals
) -> None:
    with Command("--concurrency", concurrency, directory=tmp_path) as server:
        ready(server, concurrency)
        with log_in(server) as client:
            children = server.children()
            assert len(children) == (CHILDREN if concurrency == "pre-fork" else 0)
            server.send(number)
            server.exit_code()
            assert alive(children) == []
            code, output = server.wait()
            assert code == 0, output
            assert "Traceback" not in output
            with pytest.raises((EOFError, ConnectionError, ftplib.error_temp)):
                client.pwd()


@pytest.mark.parametrize("concurrency", CONCURRENCY)
def test_it_can_be_stopped_as_soon_as_it_says_how(tmp_path: Path, concurrency: str) -> None:
    with Command("--concurrency", concurrency, directory=tmp_path) as server:
        server.printed("Stop: ")
        code, output = server.stop(signal.SIGINT)
        assert code == 0, output
        assert "Traceback" not in output


BLOCKING = r"""
import os, signal, sys, time
import bridge.ftp.command
from pyftpdlib.handlers import FTPHandler

def on_login(self, username):
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    def tell(number, frame):
        ours[number](number, frame)
        os.write(1, b"handled\n")
    for number in ours:
        signal.signal(number, tell)
    os.write(1, b"blocked\n")  # not print(): the signal may come in the middle of it
    time.sleep(60)  # the whole hub: nothing is patched

FTPHandler.on_login = on_login
sys.exit(bridge.ftp.main())
"""


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_ends_it_even_if_a_handler_blocks_the_hub(
    tmp_path: Path, number: signal.Signals
) -> None:
    with Command(directory=tmp_path, program=["-c", BLOCKING]) as server, connect(server) as client:
        client.sendcmd("USER anonymous")
        client.putcmd("PASS ")
        server.printed("^blocked$")
        server.send(number)
        server.printed("^handled$")
        code, output = server.stop(number)
        assert code == -number, output
        assert "Traceback" not in output


JUST_BEFORE_REST = r"""
import ctypes, signal, sys
import gevent
import bridge.ftp.command
# A call of the loop's that no Python code follows until events have been waited for.
kill = ctypes.CDLL(None)["raise"]
gevent.get_hub().loop.run_callback(gevent.get_hub().loop.run_callback, kill, signal.SIGTERM)
sys.exit(bridge.ftp.main())
"""


def test_a_signal_is_heard_by_a_hub_about_to_rest(tmp_path: Path) -> None:
    with Command("--max-blocking-time", "0", directory=tmp_path, program=["-c", JUST_BEFORE_REST]) as server:
        code, output = server.wait()
        assert code == 0, output


@needs_cores
def test_killing_the_parent_of_pre_forked_processes_ends_them(tmp_path: Path) -> None:
    with Command("--concurrency", "pre-fork", directory=tmp_path) as server:
        children = ready(server, "pre-fork")
        code, output = server.stop(signal.SIGKILL)  # waits for who holds its stdout and stderr
        assert code == -signal.SIGKILL
        psutil.wait_procs(children, LIMIT)
        assert alive(children) == []
        assert output.count(">>> shutting down FTP server") == cores()


@needs_cores
def test_killing_the_parent_of_pre_forked_processes_ends_their_sessions(tmp_path: Path) -> None:
    with Command("--concurrency", "pre-fork", directory=tmp_path) as server:
        ready(server, "pre-fork")
        with log_in(server) as client:
            server.stop(signal.SIGKILL)
            with pytest.raises((EOFError, ConnectionError, ftplib.error_temp)):
                client.pwd()
