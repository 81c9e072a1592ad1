"""The room `users`."""
