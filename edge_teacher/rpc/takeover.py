"""Two clients of one id end each other's session; who comes back at once only makes it a fight."""

from __future__ import annotations

import random

SESSION_TAKEN_OVER = 0x8E
"""The broker's reason in DISCONNECT (MQTT 5.0, section 3.14.2.1). mosquitto 2.0.11 gives none at all."""

HUNG_UP = 0x80
"""What paho says of a connection that ended without a DISCONNECT."""

_FIRST_S = 1.0
_LONGEST_S = 60.0
_SETTLED_S = 300.0
"""A connection that has lasted for so long was not one of a fight."""

_BRIEF_S = 2.0
_SUSPICIOUS = 5
"""So many brief connections in a row, each ended without a word: perhaps there is another client."""
_SUSPECTED_S = 2.0
"""Not longer: a bad link looks the same."""


class Takeovers:
    """How long to stay away, of one connection."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._brief = 0

    def told(self, lasted_s: float) -> float:
        """The broker has said so, of a session of `lasted_s`: seconds to stay away.

        Doubled from 1 s to 60 s, and a quarter off the beat either way.
        """
        if lasted_s >= _SETTLED_S:
            self._in_a_row = 0
        wait_s = min(_LONGEST_S, _FIRST_S * 2.0**self._in_a_row)
        self._in_a_row = min(self._in_a_row + 1, 6)
        return wait_s * random.uniform(0.75, 1.25)

    def suspected(self, lasted_s: float) -> float | None:
        """A session of `lasted_s` ended without a word: seconds to stay away, if that is suspicious by now."""
        # While the other one stays away as long, this one lasts as long.
        self._brief = self._brief + 1 if lasted_s < _BRIEF_S + 1.25 * _SUSPECTED_S else 0
        return _SUSPECTED_S * random.uniform(0.75, 1.25) if self._brief >= _SUSPICIOUS else None
