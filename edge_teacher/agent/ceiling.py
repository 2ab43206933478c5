"""A ceiling on this process's memory, kept by saying no in time: the kernel's OOM killer says nothing."""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path

from edge_teacher import memory
from edge_teacher.contract.errors import Busy, TooLarge, UsageError
from edge_teacher.contract.limits import MIB

SPARE = 0.1
"""Of what the machine or the control group has, left alone: for the interpreter, for sockets, for others."""

_RETRY_AFTER_S = 1.0
_LEAST_BYTES = 8 * MIB
_LOOK_EVERY_S = 0.05
_TRIM_EVERY_S = 0.5
_MOST_KINDS = 64
_GROWS_FOR = 4
"""Steps of one size until a runtime has all the memory it wants for it: the second still takes some."""
_CAUTION = 1.25
_FRONT = 12
"""Bytes a runtime keeps for each byte of an image until it has the network's size: ONNX Runtime took 10.7 for
the float32 copies of one of 4700 x 4700."""
_SMALL_BYTES = MIB
"""What takes less is not worth asking the kernel each time."""


def default_ceiling_bytes(root: Path = Path("/")) -> int:
    """What this process may take: the least of its control groups' limits and the machine's memory.

    `root`: where /proc and /sys are looked for. A tenth is left alone.
    """
    proc = root / "proc"
    limits = (memory.limit_bytes(proc, root / "sys/fs/cgroup"), memory.total_bytes(proc))
    known = [limit for limit in limits if limit]
    return int(min(known, default=1024 * MIB) * (1 - SPARE))


class MemoryCeiling:
    """Thread-safe. Who wants memory asks before; what inferences take is learnt from what they took."""

    def __init__(
        self,
        ceiling_bytes: int,
        *,
        resident: Callable[[], int] = memory.resident_bytes,
        available: Callable[[], int | None] = memory.available_bytes,
        trim: Callable[[], None] | None = None,
    ) -> None:
        """`resident`, `available`: bytes this process has, and the machine could still give.

        Made when everything that stays is loaded: the rest is for questions. Raises UsageError if that
        is nothing.
        """
        self._resident = resident
        self._stays = resident()
        self._runtime_grown = 0
        self.limit(ceiling_bytes)
        self._available = available
        self._trim = trim or _give_back
        self._reserved = 0
        self._lock = threading.Lock()
        self._looked_at = -1.0
        self._trimmed_at = -1.0
        self._seen_room = 0
        self._steps: dict[Hashable, _StepCost] = {}
        self._runtime_bytes = 0
        """What steps have made this process grow by: it is not given back."""

    def for_questions(self, ceiling_bytes: int) -> int:
        """What such a ceiling would leave beside what stays. Raises UsageError if that is nothing."""
        left = ceiling_bytes - self._stays - self._runtime_grown
        if left < _LEAST_BYTES:
            raise UsageError(
                f"the memory ceiling of {ceiling_bytes:,} bytes leaves {left:,} for "
                f"questions beside what the teacher takes; at least {_LEAST_BYTES:,} are needed: raise it, "
                "or the limit of this process's control group"
            )
        return left

    def limit(self, ceiling_bytes: int) -> int:
        """Another ceiling, for what is asked from now on, and what it leaves. Raises as `for_questions`."""
        self._for_questions = self.for_questions(ceiling_bytes)
        self.ceiling_bytes = ceiling_bytes
        return self._for_questions

    @property
    def reserved_bytes(self) -> int:
        """Promised to what is being computed."""
        return self._reserved

    def room(self, *, exact: bool = True) -> int:
        """Bytes that may still be taken; `exact`: as it is now, not as it was a moment ago."""
        now = time.monotonic()
        if exact or now - self._looked_at > _LOOK_EVERY_S:
            room = self.ceiling_bytes - self._resident()
            available = self._available()
            if available is not None:
                # The machine's memory is everybody's, on a Jetson the GPU's too.
                room = min(room, int(available * (1 - SPARE)))
            self._seen_room, self._looked_at = room, now
        return self._seen_room - self._reserved

    def has_room(self, need_bytes: int) -> bool:
        """Whether so much may be taken now, if need be after what is free has been given back."""
        if need_bytes <= self.room(exact=need_bytes > _SMALL_BYTES):
            return True
        # What was freed may still be counted as this process's.
        now = time.monotonic()
        if now - self._trimmed_at > _TRIM_EVERY_S:
            self._trimmed_at = now
            self._trim()
        return need_bytes <= self.room()

    def reserve(self, need_bytes: int) -> Callable[[], None]:
        """Set so much aside until what is returned is called.

        Raises Busy where it may be there later, and TooLarge where it never will.
        """
        if need_bytes > self._for_questions:
            raise TooLarge(
                f"the answer would take {need_bytes:,} bytes of memory while it is made, and this device "
                f"has {self._for_questions:,} for all questions; ask about fewer images at once"
            )
        with self._lock:
            if not self.has_room(need_bytes):
                raise Busy(
                    f"the answer would take {need_bytes:,} bytes of memory, and {max(0, self.room()):,} "
                    f"are left of {self.ceiling_bytes:,}; ask again later, or about fewer images at once",
                    retry_after_s=_RETRY_AFTER_S,
                )
            self._reserved += need_bytes
        released = [False]

        def release() -> None:
            with self._lock:
                if not released[0]:
                    released[0] = True
                    self._reserved -= need_bytes

        return release

    # ── what a step takes ────────────────────────────────────────────────────────────────────

    def fits(self, kind: Hashable, rows: int) -> bool:
        """Whether a step of so many rows is expected to stay below the ceiling, and to leave enough of it.

        A runtime keeps what it has once needed: it may have a quarter, as `Limits.within` leaves it.
        """
        cost = self._steps.get(kind)
        more = 0 if cost is None else cost.expected_growth(rows)
        if more <= 0:
            return True
        return self._runtime_bytes + more <= self._for_questions // 4 and self.has_room(more)

    def require_front(self, kind: Hashable, size: tuple[int, ...]) -> None:
        """Before a step of a kind that nothing is known of: whether one image, (height, width), may be tried.

        A runtime keeps what it has once needed, so one image that is too much would be one too much for
        good. Raises TooLarge for more than the runtime may have, and Busy where it is not there now.
        """
        if kind in self._steps:
            return
        need = math.prod(size) * 3 * _FRONT
        share = self._for_questions // 4
        shape = " x ".join(map(str, size))
        if need > share:
            raise TooLarge(
                f"an image of {shape} would take about {need:,} bytes of memory while it is computed, and "
                f"this device has {share:,} for that; send smaller images"
            )
        if not self.has_room(need):
            raise Busy(
                f"an image of {shape} would take about {need:,} bytes of memory while it is computed, and "
                f"{max(0, self.room()):,} are left of {self.ceiling_bytes:,}; ask again later",
                retry_after_s=_RETRY_AFTER_S,
            )

    def runtime_changed(self, grown_bytes: int) -> int:
        """Another runtime answers, and has taken so much since the start: what is left for questions.

        It is there already, so it is no error if that is next to nothing. What a step takes is learnt anew.
        """
        with self._lock:
            self._runtime_grown = grown_bytes
            left = self.ceiling_bytes - self._stays - grown_bytes
            self._for_questions = max(_LEAST_BYTES, left)
            self._steps = {}
            self._runtime_bytes = 0
            return self._for_questions

    def before_step(self, kind: Hashable, rows: int) -> int | None:
        """What to hand to `after_step`: None where nothing is to be learnt from this one."""
        cost = self._steps.get(kind)
        return None if cost is not None and cost.is_known(rows) else self._resident()

    def after_step(self, kind: Hashable, rows: int, before: int | None) -> None:
        if before is None:
            return
        if kind not in self._steps and len(self._steps) >= _MOST_KINDS:
            self._steps.pop(next(iter(self._steps)))
        grown = max(0, self._resident() - before)
        self._steps.setdefault(kind, _StepCost()).learn(rows, grown)
        self._runtime_bytes += grown


class _StepCost:
    """What the runtime keeps for itself grows with the largest batch it has seen, and is not given back."""

    def __init__(self) -> None:
        self._smallest = 0
        self._largest = 0
        self._times = 0
        """Steps with the largest number of rows."""
        self._grown = 0
        """Since there was more than the smallest number of rows."""

    def is_known(self, rows: int) -> bool:
        return rows < self._largest or (rows == self._largest and self._times >= _GROWS_FOR)

    def learn(self, rows: int, grown: int) -> None:
        if rows > self._largest:
            self._largest, self._times = rows, 0
        self._times += 1
        if not self._smallest:
            self._smallest = rows
        if rows > self._smallest:  # the first one also pays for what does not depend on the batch
            self._grown += grown

    def expected_growth(self, rows: int) -> int:
        if rows <= self._largest or self._largest == self._smallest:
            return 0
        each = self._grown / (self._largest - self._smallest)
        return int((rows - self._largest) * each * _CAUTION)


def _give_back() -> None:
    """Free memory back to the kernel; glibc keeps what it may need again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
