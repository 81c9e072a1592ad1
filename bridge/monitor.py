"""Deprecated, gone with 1.0: `watch_hub` is in bridge."""

import warnings

from bridge import watch_hub

__all__ = ["watch_hub"]

warnings.warn("bridge.monitor is deprecated: watch_hub is in bridge", DeprecationWarning, stacklevel=2)
