"""FTP and FTPS handlers that survive: shortages, full disks, floods, and a server that stops.

`GeventFTPServer` gives every handler class it serves what is in here (`prepared`), so an existing program
changes its server class and nothing else. `FTPHandler` and `TLS_FTPHandler` are pyftpdlib's with the same
built in, to start a new program from. The mix-ins for control connections are in control.py, those for data
connections in ports.py, data.py and upload.py.

What differs from pyftpdlib, and why:

- **The lack of a descriptor, a port or memory costs a transfer, not the session.** pyftpdlib lets the
  OSError of PASV end the session, and drops the acceptor when accept() fails, so that the client waits for
  ever. Here the transfer gets 425, or 451 if it is the file that cannot be opened.
- **Data connections take ports in TIME_WAIT**, where each port is for 60 s after a transfer. Left to the
  kernel, bind() gets slower with each of them (6 ms in the end) and fails when all are (measured).
- **`passive_ports` are the only ports.** When all are in use, 425; pyftpdlib takes any port then, which the
  firewall that made somebody set `passive_ports` does not let through.
- **A full disk is 452, a quota or size limit 552** (RFC 959 4.2), also when the error comes only with
  close(), after which pyftpdlib never replies.
- **Every transfer has one end** that the client is told of (transfer.py).
- **A file that cannot be looked at is 550**, and its path not taken for one in the home
  (filesystems/local.py).
- **Names that are not in the session's encoding are kept byte for byte** (`UNICODE_ERRORS`).
- **A rename over a file needs the right to delete or to write it**, besides the right to rename.
"""

from __future__ import annotations

from typing import Any

import pyftpdlib.handlers
from pyftpdlib.filesystems import AbstractedFS

from bridge.filesystems import AtomicFS, HomeFS, OffloadedFS, VirtualFS
from bridge.session.control import SessionMixin
from bridge.session.data import TransferMixin
from bridge.session.hooks import Events
from bridge.session.ports import ActiveMixin, PassiveMixin

#: For bytes that are not in the session's encoding (PEP 383): a name is the same bytes on the wire and on the
#: disk, so two names stay two. pyftpdlib's "replace" makes one file of `B\xe4r.txt` and `B\xf6r.txt`.
UNICODE_ERRORS = "surrogateescape"


def prepared(handler: Any) -> Any:
    """*handler* itself if it has all of the above, else a subclass of the same name that has.

    Raises TypeError if it is no FTPHandler class.
    """
    if not (isinstance(handler, type) and issubclass(handler, pyftpdlib.handlers.FTPHandler)):
        raise TypeError(f"handler must be a subclass of pyftpdlib's FTPHandler, not {handler!r}")
    attributes: dict[str, Any] = {}
    for name, mixin in (
        ("dtp_handler", TransferMixin),
        ("passive_dtp", PassiveMixin),
        ("active_dtp", ActiveMixin),
    ):
        base: Any = getattr(handler, name)
        if not issubclass(base, mixin):
            attributes[name] = _derived(base, mixin, {})
    if _defining_class(handler, "unicode_errors") is pyftpdlib.handlers.FTPHandler:
        attributes["unicode_errors"] = UNICODE_ERRORS
    fs = getattr(handler, "abstracted_fs", None)
    if fs is AbstractedFS:
        attributes["abstracted_fs"] = HomeFS
    elif _leaves_the_disk_to_pyftpdlib(fs):
        attributes["abstracted_fs"] = _derived(fs, None, {}, HomeFS)
    first = None if issubclass(handler, SessionMixin) else SessionMixin
    last = None if issubclass(handler, Events) else Events
    return _derived(handler, first, attributes, last) if first or last or attributes else handler


def _defining_class(handler: Any, name: str) -> Any:
    return next((each for each in handler.__mro__ if name in vars(each)), None)


def _leaves_the_disk_to_pyftpdlib(fs: Any) -> bool:
    """Whether no class of *fs* but our mix-ins (AtomicFS, OffloadedFS) overrides AbstractedFS."""
    if not isinstance(fs, type) or not issubclass(fs, AbstractedFS) or issubclass(fs, (HomeFS, VirtualFS)):
        return False
    methods = {name for name in vars(AbstractedFS) if not name.startswith("__")}
    others = set(fs.__mro__) - {AtomicFS, OffloadedFS, AbstractedFS}
    return not any(methods & vars(each).keys() for each in others)


def _derived(base: Any, first: Any, attributes: dict[str, Any], last: Any = None) -> Any:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    bases = tuple(each for each in (first, base, last) if each is not None)
    return type(base.__name__, bases, {**names, **attributes})


class FTPHandler(SessionMixin, pyftpdlib.handlers.FTPHandler, Events):
    """pyftpdlib's FTPHandler with all of this module."""

    abstracted_fs = HomeFS
    unicode_errors = UNICODE_ERRORS
    dtp_handler = _derived(pyftpdlib.handlers.DTPHandler, TransferMixin, {})
    passive_dtp = _derived(pyftpdlib.handlers.FTPHandler.passive_dtp, PassiveMixin, {})
    active_dtp = _derived(pyftpdlib.handlers.FTPHandler.active_dtp, ActiveMixin, {})


if hasattr(pyftpdlib.handlers, "TLS_FTPHandler"):  # pyOpenSSL is installed

    class TLS_FTPHandler(SessionMixin, pyftpdlib.handlers.TLS_FTPHandler, Events):
        """pyftpdlib's TLS_FTPHandler with all of this module."""

        abstracted_fs = HomeFS
        unicode_errors = UNICODE_ERRORS
        dtp_handler = _derived(pyftpdlib.handlers.TLS_DTPHandler, TransferMixin, {})
        passive_dtp = FTPHandler.passive_dtp
        active_dtp = FTPHandler.active_dtp
