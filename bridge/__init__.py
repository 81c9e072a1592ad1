"""bridge: pyftpdlib's FTP server on gevent's hub.

    from bridge import GeventFTPServer
    GeventFTPServer(address, handler).serve_forever()

One loop for FTP and everything else in a gevent program, patched or not: handlers may wait
cooperatively, and one that waits stalls its own session only. `GeventIOLoop` alone does that for
pyftpdlib's own servers; `python -m bridge.ftp` is a complete server. Importing bridge patches nothing,
starts nothing and takes no hub.
"""

from typing import TYPE_CHECKING

from bridge.authorizers import OffloadedAuthorizer
from bridge.default import install, uninstall
from bridge.handlers import FTPHandler
from bridge.hashing import HashMixin
from bridge.ioloop import GeventIOLoop
from bridge.offload import OffloadedFS
from bridge.servers import GeventFTPServer
from bridge.testing import running
from bridge.turns import current_session
from bridge.uploads import AtomicFS
from bridge.virtual import VirtualFS

__all__ = [
    "AtomicFS",
    "FTPHandler",
    "GeventFTPServer",
    "GeventIOLoop",
    "HashMixin",
    "OffloadedAuthorizer",
    "OffloadedFS",
    "VirtualFS",
    "current_session",
    "install",
    "running",
    "uninstall",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """`__version__`: that of the installed distribution; the number itself stands in pyproject.toml."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pyftpdlib-gevent")
        except PackageNotFoundError:
            return "unknown (not installed)"
