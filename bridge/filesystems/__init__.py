"""The room `filesystems`."""
