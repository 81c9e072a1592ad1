"""How much of a test under tests/proof to do."""

from __future__ import annotations

from typing import Literal

#: What tests/proof is asked for: seconds of a test, minutes, or hours.
Effort = Literal["short", "proof", "long"]
