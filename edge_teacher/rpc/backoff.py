"""How long to wait before the next try: doubled each time up to a bound, and never all in one moment."""

from __future__ import annotations

import random


class Backoff:
    """Seconds to wait, of one thing that is tried again and again.

    Each wait is drawn from the upper half of its span ("equal jitter"), so that a fleet whose broker was
    away for a week does not come back in one moment, and no wait is nearly nothing.
    """

    def __init__(self, *, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._doubled = 0

    def next_s(self) -> float:
        """The wait before the next try, 50 % to 100 % of a span from `first_s` to `longest_s`."""
        span = min(self._longest_s, self._first_s * 2.0**self._doubled)
        if span < self._longest_s:
            self._doubled += 1  # and no further: a week of tries must not overflow
        return span * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It has worked: the next wait is a short one again."""
        self._doubled = 0
