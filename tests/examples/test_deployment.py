"""The examples for systemd and Docker agree with the command: its options, its ports, its times.

systemd's own judgement is asked where systemd-analyze is installed. No image is built: what the Dockerfile
says is read, and its health check run without it.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import bridge.ftp.command
from bridge.ftp.options import parser_of
from support.cli import LIMIT, Command, run

EXAMPLES = Path(__file__).parents[2] / "examples"
SERVICE = EXAMPLES / "systemd" / "bridge-ftp.service"
SOCKET = EXAMPLES / "systemd" / "bridge-ftp.socket"
DOCKERFILE = EXAMPLES / "docker" / "Dockerfile"

#: `systemd-analyze security`, 0 to 100: what is left is the network, Unix sockets for systemd, the
#: host's files, children that feed the watchdog, and memory that pyOpenSSL's callbacks need.
EXPOSURE = 20


def options_after_module(words: list[str]) -> Namespace:
    assert words[1:3] == ["-m", "bridge.ftp"]
    options: Namespace = parser_of(bridge.ftp.command.PARTS).parse_args(words[3:])
    return options


# --- systemd


def unit(path: Path) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment]
    parsed.read(path)
    return parsed


def test_the_service_starts_what_there_is() -> None:
    service = unit(SERVICE)["Service"]
    options = options_after_module(shlex.split(service["ExecStart"]))
    assert options.directory == "/srv/ftp"
    assert options.stop_timeout < float(service["TimeoutStopSec"])
    assert service["Type"] == "notify"
    assert (service["ExecReload"], service["NotifyAccess"]) == ("/bin/kill -HUP $MAINPID", "all")


@pytest.mark.program
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (systemd)")
def test_systemd_has_nothing_against_the_units(tmp_path: Path) -> None:
    text = SERVICE.read_text().replace("/opt/bridge-ftp/bin/python", "/bin/sh")  # a program that is there
    (tmp_path / SERVICE.name).write_text(text)
    shutil.copy(SOCKET, tmp_path)
    command = ["systemd-analyze", "verify", str(tmp_path / SERVICE.name), str(tmp_path / SOCKET.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    ours = [line for line in done.stderr.splitlines() if "bridge-ftp" in line]
    assert (done.returncode, ours) == (0, []), done


@pytest.mark.program
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (systemd)")
def test_the_service_is_confined() -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager"]
    command += [f"--threshold={EXPOSURE}", str(SERVICE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert "Overall exposure level" in done.stdout, done
    assert done.returncode == 0, done.stdout


# --- Docker


def instructions() -> dict[str, list[str]]:
    """The arguments of each instruction of the Dockerfile, in order."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    found: dict[str, list[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(re.sub(r"\s+", " ", rest))
    return found


def test_the_container_serves_on_the_ports_that_it_shows() -> None:
    found = instructions()
    [entry] = found["ENTRYPOINT"]
    options = options_after_module(json.loads(entry))
    [exposed] = found["EXPOSE"]
    assert exposed == f"{options.port} {options.range[0]}-{options.range[-1]}"
    published = re.findall(r"-p (\S+)", DOCKERFILE.read_text())
    assert published == [f"21:{options.port}", f"{exposed.split()[1]}:{exposed.split()[1]}"]
    assert options.port >= 1024  # its user is not root
    [user] = found["USER"]
    assert re.fullmatch(r"[1-9]\d*", user)
    assert list(found)[-1] == "ENTRYPOINT"


def test_the_image_is_built_from_files_that_there_are() -> None:
    root = EXAMPLES.parent
    sources = [word for line in instructions()["COPY"] if "--from" not in line for word in line.split()[:-1]]
    assert sources == ["pyproject.toml", "README.md", "LICENSE", "bridge"]
    for name in sources:
        assert (root / name).exists(), name
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert [line[1:] for line in ignored if line.startswith("!")] == sources


@pytest.mark.program
def test_the_health_check_is_glad_of_a_greeting_and_not_of_a_closed_port(tmp_path: Path) -> None:
    [check] = instructions()["HEALTHCHECK"]
    code = json.loads(check.partition("CMD ")[2])[-1]
    with Command(directory=tmp_path) as server:
        assert "2121" in code
        code = code.replace("2121", str(server.port))
        assert run(sys.executable, "-c", code).returncode == 0
        server.stop()
    assert run(sys.executable, "-c", code).returncode != 0
