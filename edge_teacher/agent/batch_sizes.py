"""How many images one inference should have: measured, and never more than time and memory allow.

What is best differs from machine to machine. On a CPU whose cache holds the activations of eight images,
sixteen may be slower by a third; on a GPU sixteen may cost what one does. So it is not guessed: while the
device is idle after its start, and while it works, sizes are tried and the fastest is kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
"""What decides how long a step takes, but for its rows."""

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

_SAMPLES = 5
"""Of one size before it is trusted, without the first: that one also pays for memory and for plans."""
_KEPT = 9
_AS_GOOD = 1.05
"""Rates that differ by less are the same, as far as can be measured."""
_STEP_S = 5e-5
"""What a step costs beside the inference: 39 µs of Python were measured on x86-64, and it changes threads."""
_SHORT = 0.25
"""Of the latency: steps of that length cost little between them, and make nobody wait."""
_WORSE = 0.9
_AGAIN_EVERY = 200
"""Steps after which a neighbour of the best is measured again: a machine warms up, and others use it."""
_MOST_KINDS = 16


@dataclass
class _Kind:
    """What is known of one graph, one size of images and one choice of outputs."""

    seconds: dict[int, deque[float]] = field(default_factory=dict)
    """Rows to what the last steps took."""
    begun: set[int] = field(default_factory=set)
    cap: int = SIZES[-1]
    """The runtime failed beyond it."""
    steps: int = 0
    again: int = 0
    """Which neighbour is next to be measured again."""
    settled: tuple[int, int | None] | None = None
    """(the best, what is still to be tried), for as long as nothing new is known."""

    def known(self, rows: int) -> float | None:
        """Seconds of a step with so many rows; None before it is trusted.

        The fastest of the last ones: what else the machine does only ever adds time.
        """
        samples = self.seconds.get(rows, ())
        return min(samples) if len(samples) >= _SAMPLES else None

    def rates(self) -> dict[int, float]:
        found = {rows: self.known(rows) for rows in SIZES}
        return {
            rows: rows / (taken + _STEP_S) for rows, taken in found.items() if taken is not None
        }


class BatchSizes(Generic[K]):
    """Not thread-safe: whoever has the turn to compute asks and tells it."""

    def __init__(self, *, latency_s: float, fits: Callable[[K, int], bool]) -> None:
        """`latency_s`: what one step may take, because a query that comes during it waits for its end.

        `fits`: whether memory allows a step of the kind with so many rows.
        """
        self._latency_s = latency_s
        self._fits = fits
        self._kinds: OrderedDict[K, _Kind] = OrderedDict()

    def choose(self, kind: K, waiting: int) -> int:
        """Rows of the next step when so many wait: at least 1, at most `waiting`."""
        known = self._kind(kind)
        known.steps += 1
        again = known.steps % _AGAIN_EVERY == 0
        if again:
            known.settled = None  # memory may have become short, or free
        best, untried = self._settled(kind, known)
        if untried is not None and untried <= waiting:
            return untried
        if again:
            near = [s for s in (best // 2, best * 2) if s <= waiting and s in known.rates()]
            near = [size for size in near if size in self._allowed(kind, known)]
            if near:
                known.again += 1
                return near[known.again % len(near)]
        return min(best, waiting)

    def forget(self) -> None:
        """Nothing of what was measured holds any more."""
        self._kinds.clear()

    def untried(self, kind: K) -> int | None:
        """The smallest size that is worth measuring and is not known yet."""
        return self._settled(kind, self._kind(kind))[1]

    def _settled(self, kind: K, known: _Kind) -> tuple[int, int | None]:
        if known.settled is None:
            best = self._best(known)
            while best > 1 and not self._fits(kind, best):
                best //= 2
            known.settled = best, self._find_untried(kind, known)
        return known.settled

    def _find_untried(self, kind: K, known: _Kind) -> int | None:
        rates = known.rates()
        top = max(rates.values(), default=0.0)
        best = self._best(known)
        worse = 0
        for size in self._allowed(kind, known):
            if size not in rates:
                return size
            # Two sizes in a row that are clearly slower: what is larger still only takes memory.
            worse = worse + 1 if rates[size] < _WORSE * top else 0
            if worse == 2 and size > best:
                return None
        return None

    def took(self, kind: K, rows: int, seconds: float) -> None:
        """A step with so many rows has taken so long, undisturbed."""
        if rows not in SIZES:
            return
        known = self._kind(kind)
        if rows not in known.begun:
            known.begun.add(rows)
            return
        samples = known.seconds.setdefault(rows, deque(maxlen=_KEPT))
        samples.append(seconds)
        if len(samples) == _SAMPLES:
            known.settled = None

    def too_large(self, kind: K, rows: int) -> None:
        """The runtime failed on so many rows, and not on fewer."""
        known = self._kind(kind)
        known.cap = min(known.cap, max(s for s in SIZES if s == 1 or s < rows))
        known.settled = None

    def best(self, kind: K) -> int:
        """As far as it is known."""
        return self._settled(kind, self._kind(kind))[0]

    def rates(self, kind: K) -> dict[int, float]:
        """Images per second by rows of a step, as far as they are known."""
        return self._kind(kind).rates()

    def seconds(self, kind: K, rows: int) -> float | None:
        """What `rows` images will take, by what the best step takes."""
        known = self._kind(kind)
        best = self._best(known)
        taken = known.known(best)
        return None if taken is None else taken / best * rows

    def _best(self, known: _Kind) -> int:
        """The fastest within the latency; of several as fast, the one with the fewest steps that is short."""
        rates = {
            size: rate
            for size, rate in known.rates().items()
            if size <= known.cap and (size == 1 or size / rate <= self._latency_s)
        }
        if not rates:
            return 1
        top = max(rates.values())
        good = [size for size, rate in rates.items() if rate * _AS_GOOD >= top]
        short = [size for size in good if size / rates[size] <= self._latency_s * _SHORT]
        return max(short, default=min(good))

    def _allowed(self, kind: K, known: _Kind) -> list[int]:
        """Sizes that are expected to keep within time and memory, by the largest smaller one measured."""
        found: list[int] = []
        each = 0.0
        for size in SIZES:
            taken = known.known(size)
            each = taken / size if taken is not None else each
            within = size == 1 or size * each <= self._latency_s
            if size > known.cap or not within or not (size == 1 or self._fits(kind, size)):
                break
            found.append(size)
        return found

    def _kind(self, kind: K) -> _Kind:
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = _Kind()
            if len(self._kinds) > _MOST_KINDS:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(kind)
        return found
