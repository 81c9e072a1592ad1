"""Who may see the status page and disconnect sessions.

A leaf of the package, below app.py, which asks with the environment of a WSGI request.

- The page and /status.json name users, addresses and files. With a password: for whoever has it. Without:
  only on a loopback address, and only if the browser asked for it by address or as `localhost`, so that no
  page of the Internet can have its own name point here and read it (DNS rebinding).
- To disconnect a session takes the password and a token from the page. A browser sends the password also
  with what other pages make it send here, so Origin and Sec-Fetch-Site must be the page's own; and it keeps
  the password for the name it was typed for, so a name that was made to point here has none.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
from typing import Any
from urllib.parse import parse_qs, urlsplit

import gevent

from bridge.server import ConfigError

log = logging.getLogger(__name__)

#: Where user and password may be, so that they are not in the list of processes.
ENVIRONMENT = "BRIDGE_HTTP_ADMIN"

#: Seconds that a wrong password costs whoever sent it.
WRONG = 1.0

#: Bytes of a form that disconnects: 12 of a session's name, 32 of the token, and their names.
FORM = 1024

#: What a wrong Origin and a missing one are told alike.
_FOREIGN = "Only from the page itself."


class Refused(Exception):
    """An answer that is no 200: status, text and headers of its own."""

    def __init__(self, status: str, text: str, *headers: tuple[str, str]) -> None:
        super().__init__(status)
        self.status, self.text, self.headers = status, text, headers


def administrator(value: str | None) -> tuple[str, str] | None:
    """User and password of --http-admin *value*, or of the environment. Raises ConfigError."""
    where = "--http-admin"
    if value is None:
        value, where = os.environ.get(ENVIRONMENT), ENVIRONMENT
        if value is None:
            return None
    elif value.startswith("@"):
        where = f"--http-admin {value}"
        try:
            with open(value[1:], encoding="utf-8") as file:
                value = file.readline().rstrip("\r\n")
        except OSError as error:
            raise ConfigError(f"{where}: cannot read it: {error.strerror}") from None
        except UnicodeError:
            raise ConfigError(f"{where}: its first line is not UTF-8") from None
    user, _, password = value.partition(":")
    if not user or not password:
        raise ConfigError(f"{where}: write USER:PASSWORD, neither of them empty")
    return user, password


class Guard:
    """Checks requests; every check raises Refused.

    - (tuple) admin: user and password; None for no password.
    """

    def __init__(self, admin: tuple[str, str] | None) -> None:
        self._admin = None if admin is None else [_digest(each) for each in admin]
        #: In the page's forms. The same in all processes forked from here, which answer for each other.
        self.token = None if admin is None else secrets.token_urlsafe(24)

    # --- runs in a greenlet for each connection: may wait

    def check_reader(self, environ: dict[str, Any], is_local: bool) -> None:
        """May this request see the page? *is_local*: it came to a loopback address."""
        if self._admin is not None:
            self._check_password(environ, self._admin)
        elif not is_local:
            raise Refused(
                "403 Forbidden",
                "The page names users and files. Start with --http-admin, or with --http on 127.0.0.1. "
                "/metrics and /healthz are open.",
            )
        elif not _is_address(environ.get("HTTP_HOST", "")):
            raise Refused(
                "403 Forbidden",
                "Open the page by address (http://127.0.0.1:.../), or start with --http-admin.",
            )

    def check_operator(self, environ: dict[str, Any]) -> tuple[str, dict[str, str]]:
        """May this request change something? Returns the user and the fields of its form."""
        if self._admin is None or self.token is None:
            raise Refused("403 Forbidden", "To disconnect sessions, start with --http-admin.")
        _check_origin(environ)
        user = self._check_password(environ, self._admin)
        form = _form(environ)
        if not hmac.compare_digest(_digest(form.get("token", "")), _digest(self.token)):
            raise Refused("403 Forbidden", "The page is older than the server. Load it again.")
        return user, form

    def _check_password(self, environ: dict[str, Any], expected: list[bytes]) -> str:
        given = _credentials(environ)
        right = [hmac.compare_digest(_digest(a), b) for a, b in zip(given, expected, strict=True)]
        if all(right):  # (both were compared, whatever the first one was)
            return given[0]
        if environ.get("HTTP_AUTHORIZATION"):
            log.warning("wrong user or password for the page, from %s", environ.get("REMOTE_ADDR", "?"))
            gevent.sleep(WRONG)
        raise Refused(
            "401 Unauthorized",
            "User and password are those of --http-admin.",
            ("WWW-Authenticate", 'Basic realm="FTP server", charset="UTF-8"'),
        )


def _digest(text: str) -> bytes:
    """Of one length for all, so that comparing tells nothing about it."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _credentials(environ: dict[str, Any]) -> tuple[str, str]:
    """User and password of the request (RFC 7617); empty if there are none."""
    kind, _, value = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    try:
        decoded = base64.b64decode(value, validate=True).decode() if kind.lower() == "basic" else ""
    except (binascii.Error, ValueError):
        decoded = ""
    user, _, password = decoded.partition(":")
    return user, password


def _check_origin(environ: dict[str, Any]) -> None:
    """Refuse what a page of another origin has sent. Programs, which are no browsers, send neither header."""
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") != "same-origin":
        raise Refused("403 Forbidden", _FOREIGN)
    origin = environ.get("HTTP_ORIGIN")
    if origin is not None:
        # Not its scheme: a proxy may speak TLS for us.
        host = environ.get("HTTP_HOST", "").lower()
        if not host or urlsplit(origin).netloc.lower() != host:
            raise Refused("403 Forbidden", _FOREIGN)


def _is_address(host: str) -> bool:
    """Whether the header Host names an IP address or `localhost`, which DNS cannot make somebody else's."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name != "localhost":
            ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _form(environ: dict[str, Any]) -> dict[str, str]:
    """The fields of the request's form."""
    length = environ.get("CONTENT_LENGTH") or "0"
    if not length.isdecimal() or int(length) > FORM:
        raise Refused("413 Content Too Large", f"A form has at most {FORM} bytes.")
    try:
        fields = parse_qs(environ["wsgi.input"].read(int(length)).decode("latin-1"), max_num_fields=8)
    except ValueError:
        raise Refused("400 Bad Request", "A form has at most 8 fields.") from None
    return {name: values[0] for name, values in fields.items()}
