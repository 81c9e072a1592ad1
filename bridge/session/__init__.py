"""One client: its control connection, its transfers, its data connections.

handlers.py makes a handler class out of pyftpdlib's and lists what differs. Control connections: control.py,
pipelining.py, hardening.py, transfer.py (how a transfer ends), hooks.py (what a program is told and asked),
hash_commands.py with checksums.py. Data connections: ports.py, data.py, upload.py.

It knows of one client only: limits, other sessions and the server's life are in `bridge.server`. Begin with
handlers.py.

Public names: Events, FTPHandler, HashMixin, TLS_FTPHandler (with pyOpenSSL), Transfer, prepared. (The rest is
for other rooms.)
"""

from bridge.session import handlers
from bridge.session.addresses import plain
from bridge.session.control import LAST_REPLY_TIMEOUT
from bridge.session.data import transferring
from bridge.session.handlers import FTPHandler, prepared
from bridge.session.hash_commands import HashMixin
from bridge.session.hooks import Events, Transfer, transfer_of
from bridge.session.transfer import TRANSFERS
from bridge.session.upload import cut_at_quota, is_bare_eof

__all__ = [
    "LAST_REPLY_TIMEOUT",
    "TRANSFERS",
    "Events",
    "FTPHandler",
    "HashMixin",
    "Transfer",
    "cut_at_quota",
    "is_bare_eof",
    "plain",
    "prepared",
    "transfer_of",
    "transferring",
]

if hasattr(handlers, "TLS_FTPHandler"):  # pyOpenSSL is installed
    from bridge.session.handlers import TLS_FTPHandler

    __all__ += ["TLS_FTPHandler"]
