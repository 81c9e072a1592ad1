"""bridge: pyftpdlib's FTP server on gevent's hub.

    from bridge import GeventIOLoop
    FTPServer(address, handler, ioloop=GeventIOLoop()).serve_forever()

One loop for FTP and everything else in a gevent program, patched or not: handlers may wait
cooperatively, and one that waits stalls its own session only. `python -m bridge.ftp` is a complete
server. Importing bridge patches nothing, starts nothing and takes no hub.
"""

from typing import TYPE_CHECKING

from bridge.default import install, uninstall
from bridge.ioloop import GeventIOLoop
from bridge.turns import current_session

__all__ = ["GeventIOLoop", "current_session", "install", "uninstall"]

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
