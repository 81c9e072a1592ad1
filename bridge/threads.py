"""Deprecated, gone with 1.0: `Threads` is in bridge.filesystems."""

import warnings

from bridge.filesystems import Threads

__all__ = ["Threads"]

warnings.warn(
    "bridge.threads is deprecated: Threads is in bridge.filesystems", DeprecationWarning, stacklevel=2
)
