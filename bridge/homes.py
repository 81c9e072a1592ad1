"""Deprecated, gone with 1.0: `HomeFS` is in bridge.filesystems."""

import warnings

from bridge.filesystems import HomeFS

__all__ = ["HomeFS"]

warnings.warn("bridge.homes is deprecated: HomeFS is in bridge.filesystems", DeprecationWarning, stacklevel=2)
