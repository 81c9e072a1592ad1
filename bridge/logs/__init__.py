"""The room `logs`."""
