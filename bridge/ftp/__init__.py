"""The room `ftp`."""
