"""The room `proxy`."""
