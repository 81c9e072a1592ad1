"""bridge: pyftpdlib's FTP server on gevent's hub.

    from bridge import GeventIOLoop
    FTPServer(address, handler, ioloop=GeventIOLoop()).serve_forever()

One loop for FTP and everything else in a gevent program, patched or not: handlers may wait
cooperatively, and one that waits stalls its own session only. `python -m bridge.ftp` is a complete
server. Importing bridge patches nothing, starts nothing and takes no hub.
"""

from bridge.default import install, uninstall
from bridge.ioloop import GeventIOLoop
from bridge.turns import current_session

__version__ = "0.1.0"

__all__ = ["GeventIOLoop", "current_session", "install", "uninstall"]
