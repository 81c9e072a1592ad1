"""Deprecated, gone with 1.0: `AtomicFS` is in bridge, `remove_leftovers` is in bridge.filesystems."""

import warnings

from bridge.filesystems import AtomicFS, remove_leftovers

__all__ = ["AtomicFS", "remove_leftovers"]

warnings.warn(
    "bridge.uploads is deprecated: AtomicFS is in bridge, remove_leftovers is in bridge.filesystems",
    DeprecationWarning,
    stacklevel=2,
)
