"""The room `tls`."""
