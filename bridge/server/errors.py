"""What a server cannot be made of."""


class ConfigError(Exception):
    """A setting that cannot be used: one line that says which, its value, and what to do about it."""
