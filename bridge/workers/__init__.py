"""The room `workers`."""
