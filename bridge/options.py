"""Moved: an import says where to."""

raise ImportError("bridge.options is now bridge.ftp.options")
