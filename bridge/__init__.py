"""bridge: pyftpdlib's FTP server on gevent's hub.

    from bridge import GeventFTPServer
    GeventFTPServer(address, handler).serve_forever()

One loop for FTP and everything else in a gevent program, patched or not: handlers may wait
cooperatively, and one that waits stalls its own session only. `GeventIOLoop` alone does that for
pyftpdlib's own servers; `python -m bridge.ftp` is a complete server. Importing bridge patches nothing,
starts nothing and takes no hub.
"""

from typing import TYPE_CHECKING

from bridge import session
from bridge.filesystems import AtomicFS, OffloadedAuthorizer, OffloadedFS, VirtualFS
from bridge.loop import GeventIOLoop, current_session, install, uninstall, watch_hub
from bridge.server import GeventFTPServer
from bridge.session import FTPHandler, HashMixin
from bridge.testing import running

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
    "watch_hub",
]

if hasattr(session, "TLS_FTPHandler"):  # pyOpenSSL is installed
    from bridge.session import TLS_FTPHandler

    __all__ += ["TLS_FTPHandler"]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """`__version__`: that of the installed distribution; the number itself stands in pyproject.toml."""
        if name == "TLS_FTPHandler":
            raise ImportError("bridge.TLS_FTPHandler needs pyOpenSSL: pip install 'pyftpdlib-gevent[tls]'")
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pyftpdlib-gevent")
        except PackageNotFoundError:
            return "unknown (not installed)"
