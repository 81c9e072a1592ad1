"""Deprecated, gone with 1.0: `TLS_FTPHandler` and `FTPHandler` are in bridge."""

import warnings

from bridge.session.handlers import *  # noqa: F403  (also TLS_FTPHandler, if pyOpenSSL is installed)

warnings.warn(
    "bridge.handlers is deprecated: TLS_FTPHandler and FTPHandler are in bridge",
    DeprecationWarning,
    stacklevel=2,
)
