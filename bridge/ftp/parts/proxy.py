"""Behind a load balancer, for the command: --proxy-protocol.

A part of the command (ftp/application.py). It checks the option and puts proxy/protocol.py, which does the
work, into the application: before the limits of the server and the origin check of data connections.
"""

from __future__ import annotations

import argparse
import ipaddress
from typing import Any

from bridge.ftp.application import Application
from bridge.ftp.options import UsageError


def networks(value: str) -> list[Any]:
    """Addresses and networks with commas between them."""
    found = []
    for each in value.split(","):
        try:
            found.append(ipaddress.ip_network(each.strip()))
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{error}; write addresses and networks: 10.0.0.5,2001:db8::/64"
            ) from None
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group(
        "load balancer options (need proxy-protocol: pip install 'pyftpdlib-gevent[proxy]')"
    )
    group.add_argument(
        "--proxy-protocol",
        type=networks,
        metavar="NETWORK[,NETWORK...]",
        help="connections from these addresses begin with a PROXY header, version 1 or 2, that tells the "
        "client's; passive data connections too",
    )


def configure(application: Application) -> None:
    """Take clients' addresses from PROXY headers if the options say so. Raises UsageError."""
    trusted = application.options.proxy_protocol
    if trusted is None:
        return
    try:
        from bridge.proxy.protocol import ProxiedPassiveDTP, ProxyServerMixin, QuietChecksMixin
    except ImportError:
        raise UsageError(
            "--proxy-protocol needs proxy-protocol: pip install 'pyftpdlib-gevent[proxy]'"
        ) from None
    application.server_mixins.insert(0, ProxyServerMixin)  # what others see of an address is what was told
    application.server_attributes["proxy_networks"] = trusted
    application.mixins.insert(0, QuietChecksMixin)  # before what logs
    application.attributes["passive_dtp"] = ProxiedPassiveDTP
