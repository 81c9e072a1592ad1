"""The room `ftp.parts`."""
