"""Moved: an import says where to."""

raise ImportError("bridge.site is now bridge.ftp.application: Site is Application there")
