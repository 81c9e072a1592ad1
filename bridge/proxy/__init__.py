"""Clients that come through a load balancer or a NAT.

protocol.py reads PROXY headers (version 1 and 2), on control and data connections; it needs proxy-protocol
(`pip install 'pyftpdlib-gevent[proxy]'`), so it is not imported here. masquerade.py tells each network of
clients its own address in PASV.

Nothing here trusts a header that the caller has not said to trust. Begin with protocol.py.

Public names: MasqueradeMixin.
"""

from bridge.proxy.masquerade import MasqueradeMixin

__all__ = ["MasqueradeMixin"]
