"""Deprecated, gone with 1.0: `VirtualFS` is in bridge, `Entry` is in bridge.filesystems."""

import warnings

from bridge.filesystems import Entry, VirtualFS

__all__ = ["Entry", "VirtualFS"]

warnings.warn(
    "bridge.virtual is deprecated: VirtualFS is in bridge, Entry is in bridge.filesystems",
    DeprecationWarning,
    stacklevel=2,
)
