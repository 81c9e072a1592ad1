"""Deprecated, gone with 1.0: `systemd_sockets` is in bridge.server."""

import warnings

from bridge.server import systemd_sockets

__all__ = ["systemd_sockets"]

warnings.warn(
    "bridge.listeners is deprecated: systemd_sockets is in bridge.server", DeprecationWarning, stacklevel=2
)
