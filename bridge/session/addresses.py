"""Addresses of clients as sockets tell them. A leaf of the package."""

import ipaddress


def plain(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse *ip*; where a socket for IPv6 says `::ffff:192.0.2.1`, the IPv4 address. A scope is left out.

    Raises ValueError.
    """
    address = ipaddress.ip_address(ip.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
