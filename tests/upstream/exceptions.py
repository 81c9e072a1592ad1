"""Tests of pyftpdlib that cannot apply to another loop: node id -> (condition, reason).

A test listed here must fail while its condition holds; one that passes is an error.
"""

from __future__ import annotations

EXCEPTIONS: dict[str, tuple[bool, str]] = {}
