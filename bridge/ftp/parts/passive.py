"""What passive data connections are told and get: --masquerade and --passive-ports.

--nat-address and --range are pyftpdlib's names for the simple cases. The work is done in proxy/masquerade.py.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import logging
import socket

from bridge.ftp.application import Application
from bridge.ftp.options import UsageError, port_range
from bridge.proxy import MasqueradeMixin

log = logging.getLogger(__name__)

#: In place of an address: the server's own, which is that of the control connection.
OWN = "-"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("options for passive mode")
    group.add_argument(
        "--passive-ports",
        dest="range",
        type=port_range,
        metavar="FROM-TO",
        help="ports for passive data connections, as --range",
    )
    group.add_argument(
        "--masquerade",
        action="append",
        metavar="[NETWORK=]ADDRESS",
        help="address to tell clients of this network in passive mode, or without NETWORK all others; may be "
        f"given several times, and the smallest network counts; {OWN} for the server's own address",
    )


def configure(application: Application) -> None:
    """Tell addresses and take ports as the options say. Raises UsageError."""
    _configure_addresses(application)
    if application.options.range:
        _check_ports(application)


# --- addresses


def _configure_addresses(application: Application) -> None:
    everybody: list[str | None] = []
    networks: dict[ipaddress.IPv4Network, str | None] = {}
    for value in application.options.masquerade or ():
        network_text, equals, address_text = value.rpartition("=")
        address = None if address_text == OWN else _address(address_text)
        if not equals:
            everybody.append(address)
            continue
        network = _network(network_text)
        if network in networks:
            raise UsageError(f"--masquerade: {network} is given twice")
        networks[network] = address
    if len(everybody) + bool(application.options.nat_address) > 1:
        raise UsageError("--masquerade: one address without a network, or else --nat-address")
    if everybody:
        application.attributes["masquerade_address"] = everybody[0]
    if networks:
        application.mixins.append(MasqueradeMixin)
        application.attributes["masquerade_networks"] = tuple(
            sorted(networks.items(), key=lambda item: item[0].prefixlen, reverse=True)
        )


def _network(text: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(text)
    except ValueError as error:
        raise UsageError(
            f"--masquerade: {error}; write NETWORK=ADDRESS for IPv4, 10.0.0.0/8=10.0.0.5 (IPv6 needs none)"
        ) from None


def _address(text: str) -> str:
    try:
        return socket.gethostbyname(text or ".")  # ("" would be 0.0.0.0)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name"
        raise UsageError(f"--masquerade: {text!r} is no IPv4 address and no name of one: {reason}") from None


# --- ports


def _check_ports(application: Application) -> None:
    options = application.options
    ports: list[int] = options.range
    shown = f"--passive-ports (--range) {ports[0]}-{ports[-1]}"
    if options.port in ports:
        raise UsageError(f"{shown}: leave out {options.port}, where the server listens (--port)")
    for port in (ports[0], ports[-1]):
        if not _is_allowed(options.interface, port):
            raise UsageError(
                f"{shown}: this user may not bind port {port}; begin at 1024, or give CAP_NET_BIND_SERVICE"
            )
    sessions = options.max_cons
    if not sessions or len(ports) < sessions:
        warning = (
            f"{shown}: {len(ports)} port(s) for {sessions or 'any number of'} sessions (--max-cons); "
            "while so many wait for their data connection, others get 425"
        )
        # Later, when the log goes where --log-file and --log-format say.
        application.before_bind.append(lambda: log.warning("%s", warning))


def _is_allowed(interface: str | None, port: int) -> bool:
    """Whether this process may bind *port*; one in use is allowed."""
    with socket.socket(socket.AF_INET6 if interface and ":" in interface else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((interface or "", port))
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EPERM)
    return True
