"""--masquerade and --passive-ports: what clients are told, and which ports they are given."""

from __future__ import annotations

import ftplib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent.socket
import pytest

from bridge.ftp import command as ftp
from bridge.ftp.options import UsageError, parser_of
from bridge.ftp.parts import passive
from bridge.proxy.masquerade import MasqueradeMixin
from support.cli import LIMIT, Command, run
from support.servers import Client, handler_class, has_ipv6, held_ports, started, users


def site_of(*options: str) -> Any:
    return ftp.application_of(parser_of(ftp.PARTS).parse_args(["-p", "0", *options]))


def told(site: Any, client: str) -> Any:
    """What the site's handlers tell a client who has this address."""
    handler: Any = type("Handler", tuple(site.mixins), site.attributes)()
    handler.remote_ip = client
    return handler._address_to_tell()


def test_the_smallest_network_counts_whatever_the_order() -> None:
    networks = ["10.0.0.0/8=10.0.0.1", "10.1.0.0/16=10.1.0.1", "10.1.1.0/24=-", "192.0.2.1"]
    for order in (networks, networks[::-1]):
        site = site_of(*(part for each in order for part in ("--masquerade", each)))
        assert told(site, "10.2.3.4") == "10.0.0.1"
        assert told(site, "10.1.2.3") == "10.1.0.1"
        assert told(site, "10.1.1.1") is None
        assert told(site, "203.0.113.9") == "192.0.2.1"
        assert told(site, "::ffff:10.2.3.4") == "10.0.0.1"
        assert told(site, "2001:db8::1") == "192.0.2.1"


def test_without_an_address_for_all_others_are_told_the_servers_own() -> None:
    site = site_of("--masquerade", "10.0.0.0/8=10.0.0.1")
    assert told(site, "203.0.113.9") is None


def test_nat_address_is_for_all_others() -> None:
    site = site_of("-n", "192.0.2.1", "--masquerade", "10.0.0.0/8=10.0.0.1", "--masquerade", "10.9.0.0/16=-")
    assert told(site, "203.0.113.9") == "192.0.2.1"
    assert told(site, "10.2.3.4") == "10.0.0.1"
    assert told(site, "10.9.3.4") is None


def test_an_address_alone_is_nat_address() -> None:
    assert site_of("--masquerade", "192.0.2.1").attributes["masquerade_address"] == "192.0.2.1"
    assert site_of("--masquerade", "localhost").attributes["masquerade_address"] == "127.0.0.1"
    assert MasqueradeMixin not in site_of("--masquerade", "192.0.2.1").mixins


def test_pasv_tells_it_and_epsv_has_no_address(tmp_path: Path) -> None:
    site = site_of("--ban", "0", "--masquerade", "127.0.0.5=192.0.2.5", "--masquerade", "192.0.2.1")
    attributes = {key: site.attributes[key] for key in ("masquerade_networks", "masquerade_address")}
    handler = handler_class(users(tmp_path), type("H", (*site.mixins, site.base), {}), **attributes)
    with started(handler) as server:
        for source, address in (("127.0.0.5", "192.0.2.5"), ("127.0.0.1", "192.0.2.1")):
            with From(server, source) as client:
                assert ftplib.parse227(client.command("PASV", "227"))[0] == address
                assert client.command("EPSV", "229").startswith("229 Entering extended passive mode (|||")
                assert client.store("file", b"content").startswith("226")


class From(Client):
    """A client with another of the loopback addresses."""

    def __init__(self, server: Any, source: str) -> None:
        self.source = source
        self.sock = gevent.socket.create_connection(server.address, LIMIT, (source, 0))
        self.file = self.sock.makefile("rb")
        assert self.reply().startswith("220")
        self.command("USER u", "331")
        self.command("PASS p", "230")

    def data(self) -> Any:
        port = int(self.command("EPSV", "229").split("|")[3])
        return gevent.socket.create_connection(("127.0.0.1", port), LIMIT, (self.source, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--masquerade", "10.0.0.1/8=10.0.0.1"],
            "--masquerade: 10.0.0.1/8 has host bits set; write",
        ),
        (
            ["--masquerade", "2001:db8::/32=10.0.0.1"],
            "--masquerade: Expected 4 octets in '2001:db8::'",
        ),
        (["--masquerade", "10.0.0.0/8="], "--masquerade: '' is no IPv4 address and no name of one"),
        (["--masquerade", "10.0.0.0/8=2001:db8::1"], "--masquerade: '2001:db8::1' is no IPv4 address"),
        (["--masquerade", "a..b"], "--masquerade: 'a..b' is no IPv4 address and no name of one"),
        (
            ["--masquerade", "10.0.0.0/8=10.0.0.1", "--masquerade", "10.0.0.0/8=10.0.0.2"],
            "--masquerade: 10.0.0.0/8 is given twice",
        ),
        (
            ["--masquerade", "192.0.2.1", "--nat-address", "192.0.2.2"],
            "--masquerade: one address without a network, or else --nat-address",
        ),
        (
            ["--masquerade", "192.0.2.1", "--masquerade", "192.0.2.2"],
            "--masquerade: one address without a network",
        ),
        (
            ["-p", "2121", "--passive-ports", "2000-3000"],
            "--passive-ports (--range) 2000-3000: leave out 2121, where the server listens (--port)",
        ),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        site_of(*options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", ["8000", "9000-8000", "0-10", "1-65536", "a-b"])
def test_wrong_ranges_name_the_option(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        site_of("--passive-ports", value)
    assert f"argument --passive-ports: '{value}'" in capsys.readouterr().err


def test_ports_that_may_not_be_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an ordinary user; what the kernel says to root is in the program test below."""
    asked = []

    def is_allowed(interface: str | None, port: int) -> bool:
        asked.append(port)
        return port >= 1024

    monkeypatch.setattr(passive, "_is_allowed", is_allowed)
    with pytest.raises(UsageError, match=r"900-2000: this user may not bind port 900; begin at 1024"):
        site_of("--passive-ports", "900-2000")
    site_of("--passive-ports", "1024-2000")
    assert asked == [900, 1024, 2000]


def unprivileged() -> Iterator[str]:
    """Why this cannot be asked for as another user."""
    if os.geteuid() != 0:
        yield "not root"
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
        if int(file.read()) <= 900:
            yield "every port is for everybody"


@pytest.mark.program
@pytest.mark.skipif(bool(list(unprivileged())), reason=", ".join(unprivileged()))
def test_the_kernel_is_asked_whether_a_port_may_be_bound() -> None:
    hosts = ["", "127.0.0.1", *(["::1"] if has_ipv6() else [])]
    code = (
        "import os; from bridge.ftp.parts.passive import _is_allowed as ok; print(ok('', 900)); "
        f"os.setuid(65534); print([ok(host, 900) for host in {hosts}], ok('', 2000))"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout == f"True\n{[False] * len(hosts)} True\n", done.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--passive-ports", "2000-2009"], "10 port(s) for 512 sessions (--max-cons);"),
        (["--range", "2000-2009", "--max-cons", "11"], "10 port(s) for 11 sessions (--max-cons);"),
        (["--passive-ports", "2000-2999", "--max-cons", "0"], "1000 port(s) for any number of sessions"),
        (["--passive-ports", "2000-2009", "--max-cons", "10"], None),
        (["--passive-ports", "2000-2999"], None),
        ([], None),
    ],
)
def test_fewer_ports_than_sessions_are_mentioned(
    options: list[str], line: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    site_of(*options).prepare()
    assert len(caplog.messages) == (line is not None)
    assert line is None or line in caplog.text


def test_a_port_serves_many_transfers_and_one_that_waits(tmp_path: Path) -> None:
    """What that warning says: transfers that run keep nobody from their port, those that wait for it do."""
    with held_ports(1) as port, started(handler_class(users(tmp_path), passive_ports=[port])) as server:
        with Client(server) as one, Client(server) as two, Client(server) as three:
            with one.data() as first:
                one.command("STOR one", "1")
                with two.data() as second:
                    two.command("STOR two", "1")
                    three.command("EPSV", "229")
                    assert one.command("NOOP", "200")
                    with Client(server) as four:
                        four.command("EPSV", "425")
                    first.sendall(b"first")
                    second.sendall(b"second")
            assert one.reply().startswith("226")
            assert two.reply().startswith("226")
    assert (tmp_path / "one").read_bytes() + (tmp_path / "two").read_bytes() == b"firstsecond"


@pytest.mark.program
def test_the_command_does_all_of_it(tmp_path: Path) -> None:
    options = ("--passive-ports", "20000-20999", "--masquerade", "127.0.0.0/8=192.0.2.7")
    with Command(*options, directory=tmp_path) as server, ftplib.FTP(timeout=LIMIT) as client:
        client.connect("127.0.0.1", server.port)
        client.login()
        host, port = ftplib.parse227(client.sendcmd("PASV"))
        assert host == "192.0.2.7"
        assert 20000 <= port <= 20999
