"""The status page in a real browser (Chromium), and the site of several processes that it is about."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent.socket
import pytest
from selenium import webdriver
from selenium.common.exceptions import (
    NoAlertPresentException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from support.cli import LIMIT, Command
from support.servers import Client, eventually, short_directory
from support.web import Web

pytestmark = pytest.mark.program

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium or chromedriver is not installed"
)

#: What a browser must not do by itself: call home, update, ask.
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)

NAME = "<img src=x onerror=alert(1)>.bin"
#: Bytes of a download that does not fit into the kernel's buffers (10 MB on the loopback interface).
SIZE = 100_000_000
ADMIN = ("-u", "u", "-P", "p", "-w", "--http", "0", "--http-admin", "op:secret")


@contextlib.contextmanager
def browser(profile: Path, script: bool = True) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in (*QUIET, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if not script:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    with short_directory() as sockets:  # Chromium has one there
        service = Service(CHROMEDRIVER, env={**os.environ, "TMPDIR": str(sockets)})
        driver = webdriver.Chrome(options=options, service=service)
        try:
            driver.set_page_load_timeout(LIMIT)
            yield driver
        finally:
            driver.quit()


def until(driver: Any, condition: Callable[[], Any]) -> Any:
    """Wait for what the page shows; its elements may go meanwhile."""
    gone = (NoAlertPresentException, NoSuchElementException, StaleElementReferenceException)
    return WebDriverWait(driver, LIMIT, poll_frequency=0.05, ignored_exceptions=gone).until(
        lambda _: condition()
    )


def texts(driver: Any, selector: str) -> list[str]:
    return [each.text for each in driver.find_elements(By.CSS_SELECTOR, selector)]


def url_of(server: Command, credentials: str = "") -> str:
    match = re.search(r"http://(\S+)", server.printed("Status: "))
    assert match is not None
    return f"http://{credentials}{match[1]}"


def web_of(server: Command) -> Web:
    return Web(int(url_of(server).rstrip("/").rpartition(":")[2]), "op", "secret")


class Address:
    def __init__(self, server: Command) -> None:
        self.address = ("127.0.0.1", server.port)


# --- the page


@needs_chromium
def test_the_page_lives_with_its_script(tmp_path: Path) -> None:
    """Sessions come, move and go without a reload; a name that is HTML stays a name; nobody complains."""
    home = tmp_path / "home"
    home.mkdir()
    with (home / NAME).open("wb") as file:
        file.truncate(SIZE)
    with (
        Command(*ADMIN, directory=home) as server,
        browser(tmp_path / "profile") as page,
        Client(Address(server)) as client,
    ):
        page.get(url_of(server, "op:secret@"))
        assert texts(page, "#state") == ["Serving"]
        page.execute_script("window.sameDocument = true")
        with client.data() as data:
            client.command(f"RETR {NAME}", "1")
            until(page, lambda: texts(page, ".file") == [f"/{NAME}"])
            bar = page.find_element(By.CSS_SELECTOR, "tbody progress")
            before = float(bar.get_property("value"))
            assert 0 < before < 0.5
            received = 0
            while received < SIZE // 2:
                received += len(data.recv(1 << 20))
            until(page, lambda: float(bar.get_property("value")) >= 0.5)
            until(page, lambda: len(page.find_element(By.ID, "down").get_attribute("points").split()) > 1)
        assert client.reply().startswith("426")
        with Client(Address(server), login=False):
            until(page, lambda: len(texts(page, "tbody tr")) == 2)
            assert "not logged in" in texts(page, ".user")
        until(page, lambda: len(texts(page, "tbody tr")) == 1)
        assert page.execute_script("return window.sameDocument") is True
        # (What Chromium says of its own new tab, as that the machine is slow, is nothing to us.)
        said = [each for each in page.get_log("browser") if not each["message"].startswith("chrome://")]
        assert said == []


@needs_chromium
@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
def test_the_button_disconnects(tmp_path: Path, script: bool) -> None:
    with (
        Command(*ADMIN, directory=tmp_path) as server,
        browser(tmp_path / "profile", script) as page,
        Client(Address(server)) as client,
    ):
        page.get(url_of(server, "op:secret@"))
        page.find_element(By.CSS_SELECTOR, "tbody button").click()
        if script:
            until(page, lambda: page.switch_to.alert).accept()
        assert client.reply() == "421 Disconnected by the operator."
        until(page, lambda: texts(page, "tbody tr") == [])
        assert page.current_url.endswith("/")
        server.logged("'op' disconnects session '[0-9a-f]{12}': done")


@needs_chromium
def test_without_a_script_the_page_reloads_itself(tmp_path: Path) -> None:
    with (
        Command("-u", "u", "-P", "p", "--http", "0", directory=tmp_path) as server,
        browser(tmp_path / "profile", script=False) as page,
    ):
        page.get(url_of(server))
        assert texts(page, "tbody tr") == []
        with Client(Address(server)):
            until(page, lambda: texts(page, ".user") == ["u"])


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_all_can_be_read(tmp_path: Path, width: int, scheme: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    name = "averylongname" * 16
    with (
        Command(*ADMIN, directory=home) as server,
        browser(tmp_path / "profile") as page,
        Client(Address(server)) as client,
        client.data(),
    ):
        client.command(f"STOR {name}", "1")
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        page.get(url_of(server, "op:secret@"))
        widths = page.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert widths == [width, width]
        until(page, lambda: texts(page, ".file") == [f"/{name}"])
        for element in page.find_elements(By.CSS_SELECTOR, "dd, dt, button, td span, .file, figcaption span"):
            box = element.rect
            assert box["x"] >= 0, element.text
            assert box["x"] + box["width"] <= width, element.text
            assert contrast(page, element) >= 4.5, (element.text, scheme)  # WCAG 2, AA


def contrast(page: Any, element: Any) -> float:
    """Of an element's text and what is behind it, as WCAG 2 defines it."""
    colours: list[str] = page.execute_script(
        """
        let behind = arguments[0];
        const none = "rgba(0, 0, 0, 0)";
        while (getComputedStyle(behind).backgroundColor === none) behind = behind.parentElement;
        return [getComputedStyle(arguments[0]).color, getComputedStyle(behind).backgroundColor];
        """,
        element,
    )

    def luminance(colour: str) -> float:
        parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted(map(luminance, colours))
    return (lighter + 0.05) / (darker + 0.05)


@needs_chromium
def test_a_server_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        with Command("--http", "0", directory=tmp_path) as server:
            page.get(url_of(server))
            assert not page.find_element(By.ID, "lost").is_displayed()
        until(page, lambda: page.find_element(By.ID, "lost").is_displayed())


# --- the command


def test_the_command_says_where_and_leaves_the_password_out_of_sight(tmp_path: Path) -> None:
    with Command("--http", "0", "--http-admin", "op:secret", directory=tmp_path) as server:
        url = url_of(server)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        assert web_of(server).ask("/").status == 200
        assert server.stop()[0] == 0
        assert "secret" not in server.output
    with Command("--http", "0.0.0.0:0", directory=tmp_path) as server:
        server.printed(r"^Metrics:  http://0\.0\.0\.0:\d+/metrics$")


def test_a_drain_is_seen_from_its_begin_to_its_end(tmp_path: Path) -> None:
    with Command(*ADMIN, directory=tmp_path) as server, Client(Address(server)) as client:
        web = web_of(server)
        with client.data():
            client.command("STOR file", "1")
            assert web.ask("/healthz").status == 200
            server.send(signal.SIGTERM)
            eventually(lambda: web.ask("/healthz").status == 503)
            assert web.metrics()["bridge_up"] == 0
        assert client.reply().startswith("226")
        assert server.wait()[0] == 0
        with pytest.raises(ConnectionRefusedError):
            gevent.socket.create_connection(("127.0.0.1", web.port))


# --- several processes


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Command]:
    with Command("-i", "127.0.0.1", *ADMIN, "--workers", "2", directory=tmp_path) as command:
        yield command


def in_both(server: Command, web: Web) -> list[Client]:
    """Sessions in both processes: as many as it takes."""
    clients: list[Client] = []
    while not all(each["sessions"] for each in web.status()["workers"]):
        assert len(clients) < 300, "one process gets all connections"
        clients.append(Client(Address(server)))
    return clients


def test_whichever_process_answers_it_answers_for_all(workers: Command) -> None:
    web = web_of(workers)
    clients = in_both(workers, web)
    answers = [web.metrics() for _ in range(10)]
    status = web.status()
    for metrics in answers:
        assert metrics["bridge_sessions"] == len(clients)
        of_each = [metrics[f'bridge_worker_sessions{{worker="{slot}"}}'] for slot in (0, 1)]
        assert sum(of_each) == len(clients)
        assert all(of_each)
        assert metrics['bridge_logins_total{outcome="ok"}'] == len(clients)
        assert metrics['bridge_workers{state="started"}'] == 2
    assert len({each["pid"] for each in status["workers"]}) == 2
    assert len(status["listed"]) == len(clients)
    for client in clients:
        client.close()


def test_a_session_is_disconnected_whichever_process_has_it(workers: Command) -> None:
    web = web_of(workers)
    clients = in_both(workers, web)
    match = re.search(r'name="token" value="([\w-]+)"', web.ask("/").text)
    assert match is not None
    for session in web.status()["listed"]:
        assert web.ask("/disconnect", "POST", f"session={session['id']}&token={match[1]}").status == 303
    for client in clients:
        assert client.reply().startswith("421")
        client.close()
    assert web.metrics()["bridge_disconnects_total"] == len(clients)


def test_processes_find_each_other_though_tmpdir_is_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sockets could not have such a path."""
    deep = tmp_path / ("d" * 108)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    with Command(*ADMIN, "--workers", "2", directory=tmp_path) as server:
        web = web_of(server)
        eventually(lambda: web.metrics()['bridge_workers{state="started"}'] == 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the state of a process from /proc")
def test_no_sum_falls_when_a_process_dies_or_is_stopped(workers: Command) -> None:
    web = web_of(workers)
    clients = in_both(workers, web)
    pids = {each["slot"]: each["pid"] for each in web.status()["workers"]}
    logins = 'bridge_logins_total{outcome="ok"}'

    os.kill(pids[0], signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    try:
        metrics = web.metrics()
        assert metrics[logins] == len(clients)
        assert metrics['bridge_workers{state="started"}'] == 1
        assert 0 < metrics["bridge_sessions"] < len(clients)
    finally:
        os.kill(pids[0], signal.SIGCONT)

    os.kill(pids[0], signal.SIGKILL)
    eventually(lambda: len({each["pid"] for each in web.status()["workers"]} - {pids[0]}) == 2)
    metrics = web.metrics()
    assert metrics[logins] == len(clients)
    assert metrics["bridge_starts_total"] == 3
    assert 0 < metrics["bridge_sessions"] < len(clients)
    for client in clients:
        client.close()
