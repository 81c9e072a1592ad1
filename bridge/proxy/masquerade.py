"""Passive mode behind a NAT: the address that PASV tells depends on where the client is.

Only the reply to PASV has an address, so networks and addresses are of IPv4.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

from bridge.session import plain

if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler
else:  # a mix-in: what it extends is the class it is put before
    _FTPHandler = object


class MasqueradeMixin(_FTPHandler):
    """For a handler class: the address in the reply to PASV depends on where the client is."""

    masquerade_address: Any
    #: Networks of clients and what they are told (None: the server's own address); the first that fits.
    masquerade_networks: tuple[tuple[ipaddress.IPv4Network, str | None], ...] = ()

    def _make_epasv(self, extmode: bool = False) -> None:
        if not extmode:
            self.masquerade_address = self._address_to_tell()
        super()._make_epasv(extmode)

    def _address_to_tell(self) -> Any:
        try:
            client = plain(self.remote_ip)
        except ValueError:  # a Unix socket's
            client = None
        # (IPv6: no such client sends PASV, and nothing would help it.)
        for network, address in self.masquerade_networks if client is not None else ():
            if client in network:
                return address
        return type(self).masquerade_address
