"""What --http serves to whom: pages, health, disconnecting, and what is refused."""

from __future__ import annotations

import importlib.util
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gevent
import gevent.socket
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import bridge.web.app
import bridge.web.auth
from bridge.ftp.parts.web import address
from bridge.server import ConfigError
from support.servers import PATIENCE, Client, eventually, has_utf8
from support.web import Web, serving_site, site_of

USER = ("-u", "u", "-P", "p", "-w")
ADMIN = (*USER, "--http-admin", "op:secret")

Serving = tuple[Any, Web]


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Serving]:
    """Without a password, on 127.0.0.1."""
    with serving_site(tmp_path, *USER) as serving:
        yield serving


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """With a password, which the client knows."""
    monkeypatch.setattr(bridge.web.auth, "WRONG", 0.01)
    with serving_site(tmp_path, *ADMIN, user="op", password="secret") as serving:
        yield serving


# --- what there is


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/status.json", "application/json"),
        ("/status.css", "text/css; charset=utf-8"),
        ("/status.js", "text/javascript; charset=utf-8"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
        ("/healthz", "text/plain; charset=utf-8"),
    ],
)
def test_each_path_has_its_type_and_the_headers_that_keep_it_here(
    open_site: Serving, path: str, kind: str
) -> None:
    _, web = open_site
    answer = web.ask(path)
    assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    head = web.ask(path, "HEAD")
    assert (head.status, head.text) == (200, "")
    assert int(head.headers["Content-Length"]) > 0


@pytest.mark.parametrize("path", ["/nothing", "/status.json/", "/../bridge/web.py", "//", "/disconnect/x"])
def test_there_is_nothing_else(open_site: Serving, path: str) -> None:
    assert open_site[1].ask(path).status == 404


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("POST", "/", "GET, HEAD"), ("PUT", "/metrics", "GET, HEAD"), ("GET", "/disconnect", "POST")],
)
def test_other_methods_are_refused(open_site: Serving, method: str, path: str, allowed: str) -> None:
    answer = open_site[1].ask(path, method)
    assert (answer.status, answer.headers["Allow"]) == (405, allowed)


def test_prometheus_gets_the_format_it_asks_for(open_site: Serving) -> None:
    answer = open_site[1].ask("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert {"bridge_sessions", "bridge_transfers", "bridge_hub_lag_seconds"} <= {
        family.name
        for family in text_string_to_metric_families(answer.text)  # type: ignore[no-untyped-call]
    }


def test_health_is_200_until_the_server_drains(open_site: Serving) -> None:
    server, web = open_site
    with Client(server) as client, client.data() as data:
        client.command("STOR file", "1")
        assert (web.ask("/healthz").status, web.ask("/healthz").text) == (200, "ok\n")
        stopping = gevent.spawn(server.stop, PATIENCE)
        eventually(lambda: server.state == "draining")
        assert (web.ask("/healthz").status, web.ask("/healthz").text) == (503, "draining\n")
        assert web.metrics()["bridge_up"] == 0
        assert web.metrics()['bridge_workers{state="draining"}'] == 1
        assert "Draining" in web.ask("/").text
        data.close()
        assert client.reply().startswith("226")
        stopping.join()
    assert web.ask("/healthz").status == 503


def test_a_client_that_says_nothing_loses_its_place(
    open_site: Serving, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bridge.web.app, "REQUEST_TIMEOUT", 0.05)
    _, web = open_site
    for said in (b"", b"GET /healthz", b"GET /healthz HTTP/1.1\r\nHost: x\r\nAccept: "):
        with gevent.socket.create_connection(("127.0.0.1", web.port), PATIENCE) as sock:
            sock.sendall(said)
            assert sock.recv(1000) == b""
    assert "Traceback" not in capfd.readouterr().err


# --- what is shown


@pytest.mark.skipif(not has_utf8(), reason="this locale has no name for the file")
def test_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    name = "<script>alert('x') \"&\u202egpj.exe"
    (tmp_path / name).write_bytes(bytes(20_000_000))
    with serving_site(tmp_path, "-u", '<b a="\'">', "-P", "p") as (server, web):
        with Client(server, login=False) as client:
            client.reply()
            client.command('USER <b a="\'">', "331")
            client.command("PASS p", "230")
            with client.data() as data:
                client.command(f"RETR {name}", "1")
                assert data.recv(1)
                page = web.ask("/").text
                assert web.status()["listed"][0]["transfer"]["path"].endswith("\\u202egpj.exe")
    assert "<script>" not in page
    assert "<b a" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;) &quot;&amp;\\u202egpj.exe" in page
    assert "&lt;b a=&quot;&#x27;&quot;&gt;" in page


def test_the_page_without_a_script_says_what_the_json_does(open_site: Serving) -> None:
    server, web = open_site
    with Client(server) as client, client.data() as data:
        client.command("STOR some-file", "1")
        data.sendall(b"x" * 1234)
        eventually(lambda: web.status()["listed"][0]["transfer"]["bytes"] == 1234)
        status, page = web.status(), web.ask("/").text
    shown = status["listed"][0]["shown"]
    assert (shown["file"], shown["amount"], shown["doing"]) == ("/some-file", "1.2 kB", "STOR")
    for text in ("/some-file", "1.2 kB", "STOR", "127.0.0.1"):
        assert f">{text}<" in page
    assert '<progress max="1"></progress>' in page
    assert '<noscript><meta http-equiv="refresh"' in page
    assert "Disconnect" not in page
    assert not re.search(r"(?:src|href)=\"(?!status\.|data:,)", page)  # nothing from elsewhere


def test_more_sessions_than_are_listed_are_said_to_be_there(
    open_site: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge.web.metrics, "LISTED", 1)
    server, web = open_site
    with Client(server), Client(server):
        assert len(web.status()["listed"]) == 1
        assert "and 1 more" in web.ask("/").text


# --- who may see it


def test_with_a_password_the_page_is_for_those_who_have_it(guarded: Serving) -> None:
    _, web = guarded
    for path in ("/", "/status.json"):
        assert web.ask(path).status == 200
        for wrong in (
            None,
            "Basic b3A6d3Jvbmc=",
            "Basic eDpzZWNyZXQ=",
            "Basic !",
            "Basic",
            "Bearer x",
            "Basic /w==",
        ):
            answer = web.ask(path, Authorization=wrong)
            assert answer.status == 401, wrong
            assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
            assert "sessions" not in answer.text
    for path in ("/metrics", "/healthz"):
        assert web.ask(path, Authorization=None).status == 200


def test_a_password_of_any_characters_will_do(tmp_path: Path) -> None:
    for user, password in (("ö", "ü:ß"), ("a", ":")):
        with serving_site(
            tmp_path, *USER, "--http-admin", f"{user}:{password}", user=user, password=password
        ) as (_, web):
            assert web.ask("/").status == 200


def test_a_wrong_password_is_logged_and_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge.web.auth, "WRONG", 0.2)
    with serving_site(tmp_path, *ADMIN, user="op", password="guess") as (_, web):
        started = time.monotonic()
        assert web.ask("/").status == 401
        assert time.monotonic() - started >= 0.2
    assert "wrong user or password for the page, from 127.0.0.1" in caplog.text
    assert "guess" not in caplog.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("[::1]:1", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("evil.example:80", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_without_a_password_no_name_of_the_internet_can_point_at_the_page(
    open_site: Serving, host: str, status: int
) -> None:
    for path in ("/", "/status.json"):
        assert open_site[1].ask(path, Host=host).status == status
    assert open_site[1].ask("/metrics", Host=host).status == 200


def test_without_a_password_the_page_is_on_loopback_only(tmp_path: Path) -> None:
    with serving_site(tmp_path, *USER, "--http", "0.0.0.0:0") as (_, web):
        assert web.ask("/").status == 403
        assert "--http-admin" in web.ask("/").text
        assert web.ask("/status.json").status == 403
        assert web.ask("/metrics").status == web.ask("/healthz").status == 200
    with serving_site(tmp_path, *ADMIN, "--http", "0.0.0.0:0", user="op", password="secret") as (_, web):
        assert web.ask("/", Host="ftp.example.org").status == 200


# --- disconnecting


def form_of(web: Web, session: str | None = None, token: str | None = None) -> str:
    """The body that the first button of the page sends."""
    page = web.ask("/").text
    match = re.search(
        r'name="session" value="(\w+)"><input type="hidden" name="token" value="([\w-]+)"', page
    )
    assert match is not None
    return urlencode({"session": session or match[1], "token": match[2] if token is None else token})


def test_an_operator_disconnects_a_session(guarded: Serving, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "bridge")
    server, web = guarded
    origin = f"http://127.0.0.1:{web.port}"
    with Client(server) as client, Client(server) as other:
        body = form_of(web)
        with client.data():
            client.command("STOR file", "1")
            answer = web.ask("/disconnect", "POST", body, Origin=origin, Sec_Fetch_Site="same-origin")
            assert (answer.status, answer.headers["Location"]) == (303, "./")
            assert client.reply().startswith("426")
            assert client.reply() == "421 Disconnected by the operator."
            assert client.ended()
        other.command("NOOP", "200")
        assert web.metrics()["bridge_disconnects_total"] == 1
        again = web.ask("/disconnect", "POST", body)  # it is gone; no browser: no Origin
        assert again.status == 303
        assert web.metrics()["bridge_disconnects_total"] == 1
        other.command("NOOP", "200")
    assert "'op' disconnects session" in caplog.text


FOREIGN: list[dict[str, str | None]] = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
    {"Sec_Fetch_Site": "none"},
    {"Origin": "http://evil.example", "Host": ""},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_what_another_page_sends_is_refused_even_with_password_and_token(
    guarded: Serving, headers: dict[str, str | None]
) -> None:
    server, web = guarded
    with Client(server) as client:
        assert web.ask("/disconnect", "POST", form_of(web), **headers).status == 403
        client.command("NOOP", "200")


def test_a_name_that_was_made_to_point_here_has_no_password(guarded: Serving) -> None:
    """DNS rebinding: Origin and Host agree, and the browser has nothing for them."""
    server, web = guarded
    with Client(server) as client:
        body = form_of(web)
        host = f"evil.example:{web.port}"
        answer = web.ask(
            "/disconnect",
            "POST",
            body,
            Host=host,
            Origin=f"http://{host}",
            Authorization=None,
            Sec_Fetch_Site="same-origin",
        )
        assert answer.status == 401
        client.command("NOOP", "200")


def test_without_the_token_nothing_happens(guarded: Serving) -> None:
    server, web = guarded
    with Client(server) as client:
        for token in ("", "x", "ü"):
            assert web.ask("/disconnect", "POST", form_of(web, token=token)).status == 403
        assert web.ask("/disconnect", "POST", "").status == 403
        client.command("NOOP", "200")


@pytest.mark.parametrize(
    ("body", "length", "status"),
    [("x" * 5000, None, 413), ("a=1", "-1", 400), ("a=1", "1e9", 400), ("&".join(["a=1"] * 9), None, 400)],
)
def test_a_form_has_a_size(guarded: Serving, body: str, length: str | None, status: int) -> None:
    headers = {} if length is None else {"Content_Length": length}
    assert guarded[1].ask("/disconnect", "POST", body, **headers).status == status


def test_without_a_password_nobody_can_disconnect(open_site: Serving) -> None:
    server, web = open_site
    with Client(server) as client:
        session = web.status()["listed"][0]["id"]
        body = urlencode({"session": session, "token": "None"})
        assert web.ask("/disconnect", "POST", body).status == 403
        client.command("NOOP", "200")


# --- options


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8080", ("127.0.0.1", 8080)),
        ("0", ("127.0.0.1", 0)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("host.example:1", ("host.example", 1)),
        ("[::1]:2", ("::1", 2)),
    ],
)
def test_an_address_is_a_port_or_a_host_with_one(value: str, expected: tuple[str, int]) -> None:
    assert address(value) == expected


@pytest.mark.parametrize(
    "value", ["", "x", "::1", ":80", "[::1]", "host:", "host:65536", "host:-1", "::1:80"]
)
def test_what_is_no_address_is_refused(value: str) -> None:
    with pytest.raises(Exception, match=r"write HOST:PORT|not between") as caught:
        address(value)
    assert type(caught.value).__name__ == "ArgumentTypeError"


def test_the_password_may_be_in_a_file_or_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "admin"
    file.write_text("op:from file\nmore\n")
    monkeypatch.setenv(bridge.web.auth.ENVIRONMENT, "op:from environment")
    for options, password in (
        (("--http-admin", f"@{file}"), "from file"),
        ((), "from environment"),
    ):
        with serving_site(tmp_path, *options, user="op", password=password) as (_, web):
            assert web.ask("/").status == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--http-admin", "op"], "--http-admin: write USER:PASSWORD, neither of them empty"),
        (["--http-admin", ":x"], "--http-admin: write USER:PASSWORD"),
        (["--http-admin", "op:"], "--http-admin: write USER:PASSWORD"),
        (["--http-admin", "@/nowhere"], "--http-admin @/nowhere: cannot read it: No such file"),
        (["--http-admin", "@/dev/null"], "--http-admin @/dev/null: write USER:PASSWORD"),
        (["--http", "host.invalid:80"], "--http: cannot listen on host.invalid, port 80: "),
        (["--http", "192.0.2.1:80"], "--http: cannot listen on 192.0.2.1, port 80: Cannot assign"),
    ],
)
def test_what_cannot_be_says_which_option_and_why(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        site_of(tmp_path, *options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_address_in_use_is_said_to_be(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--http: cannot listen on 127.0.0.1, port {port}: Address already"
        ):
            site_of(tmp_path, "--http", str(port))


@pytest.mark.parametrize("missing", ["prometheus_client", "psutil"])
def test_a_missing_package_is_named_with_how_to_get_it(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(
        ConfigError, match=rf"^--http needs {missing}: pip install 'pyftpdlib-gevent\[metrics\]'$"
    ):
        site_of(tmp_path)
