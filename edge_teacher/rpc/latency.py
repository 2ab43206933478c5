"""How long answers take, by method: the median and the 99th percentile of the last minutes, in a few kB."""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_PER_OCTAVE = 8
"""Steps per doubling: a percentile is off by at most half a step, 4.5 %."""
_SHORTEST_MS = 2.0**-4
_STEPS = 24 * _PER_OCTAVE
"""Up to 2^20 ms, 17 minutes; what takes longer counts as that."""
_WINDOW_S = 300.0


@dataclass(frozen=True)
class Latency:
    """Of one method. The percentiles are of the last five to ten minutes, None without an answer in them."""

    count: int
    """Since the start."""
    total_s: float
    """Of all of them."""
    p50_ms: float | None
    p99_ms: float | None


class _Method:
    def __init__(self, now: float) -> None:
        self.count = 0
        self.total_s = 0.0
        self._began = now
        self._current = array("L", [0]) * _STEPS
        self._previous = array("L", [0]) * _STEPS

    def add(self, seconds: float, now: float) -> None:
        self._turn(now)
        self.count += 1
        self.total_s += seconds
        self._current[_step(seconds * 1e3)] += 1

    def told(self, now: float) -> Latency:
        self._turn(now)
        steps = array("L", (a + b for a, b in zip(self._current, self._previous, strict=True)))
        return Latency(self.count, self.total_s, _percentile(steps, 0.5), _percentile(steps, 0.99))

    def _turn(self, now: float) -> None:
        windows = int((now - self._began) // _WINDOW_S)
        if windows < 1:
            return
        empty = array("L", [0]) * _STEPS
        self._previous = self._current if windows == 1 else empty
        self._current = array("L", [0]) * _STEPS
        self._began += windows * _WINDOW_S


class Latencies:
    """Thread-safe. Its memory depends on the number of methods only."""

    def __init__(
        self, methods: Iterable[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._methods = {name: _Method(clock()) for name in methods}

    def add(self, method: str, seconds: float) -> None:
        with self._lock:
            self._methods[method].add(seconds, self._clock())

    def told(self) -> dict[str, Latency]:
        """Of the methods that were answered at least once."""
        now = self._clock()
        with self._lock:
            return {name: m.told(now) for name, m in self._methods.items() if m.count}


def _step(milliseconds: float) -> int:
    if milliseconds <= _SHORTEST_MS:
        return 0
    return min(_STEPS - 1, int(math.log2(milliseconds / _SHORTEST_MS) * _PER_OCTAVE))


def _percentile(steps: array[int], share: float) -> float | None:
    """The middle (of the logarithms) of the step in which the answer of that rank lies."""
    total = sum(steps)
    if not total:
        return None
    rank = max(1, math.ceil(share * total))
    seen = 0
    for step, count in enumerate(steps):
        seen += count
        if seen >= rank:
            return float(_SHORTEST_MS * 2.0 ** ((step + 0.5) / _PER_OCTAVE))
    return None
