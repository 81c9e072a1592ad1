"""One server's life: bind, start, accept, drain, close; and what its worker processes share.

server.py is the server, drain.py its graceful end, sessions.py what an operator sees, listeners.py sockets,
signals.py what SIGTERM does to a process. shared_table.py and rpc.py let worker processes count together and
ask each other. errors.py is what a wrong setting raises.

It never touches a session's channels except in that session's turn. Begin with server.py.

Public names: ConfigError, GeventFTPServer, SharedTable, systemd_sockets. (The rest is for other rooms.)
"""

from bridge.server.errors import ConfigError
from bridge.server.listeners import systemd_sockets
from bridge.server.server import AddressCounts, GeventFTPServer
from bridge.server.sessions import snapshot
from bridge.server.shared_table import Full, SharedTable

__all__ = [
    "AddressCounts",
    "ConfigError",
    "Full",
    "GeventFTPServer",
    "SharedTable",
    "snapshot",
    "systemd_sockets",
]
