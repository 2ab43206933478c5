"""Two clients of one id end each other's session; who comes back at once only makes it a fight."""

from __future__ import annotations

import random

SESSION_TAKEN_OVER = 0x8E
"""The broker's reason in DISCONNECT (MQTT 5.0, section 3.14.2.1)."""

_FIRST_S = 1.0
_LONGEST_S = 60.0
_SETTLED_S = 300.0
"""A connection that has lasted for so long was not one of a fight."""


class Takeovers:
    """How long to stay away, of one connection."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def next_wait_s(self, lasted_s: float) -> float:
        """After a session of `lasted_s`: doubled from 1 s to 60 s, and a quarter off the beat either way."""
        if lasted_s >= _SETTLED_S:
            self._in_a_row = 0
        wait_s = min(_LONGEST_S, _FIRST_S * 2.0**self._in_a_row)
        self._in_a_row = min(self._in_a_row + 1, 6)
        return wait_s * random.uniform(0.75, 1.25)
