"""How long something took, without the time in which this thread was ready and had no core."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from io import FileIO


class Stopwatch:
    """Thread-safe: each thread has its own. What a busy machine adds would be learnt as the work's own.

    Linux counts the nanoseconds a thread has waited for a core (`run_delay`, the second number of
    /proc/thread-self/schedstat; Documentation/scheduler/sched-stats.rst). Where a kernel was built without
    it, the time is what passed.
    """

    def __init__(self, path: str = "/proc/thread-self/schedstat") -> None:
        self._path = path
        self._own = threading.local()

    def start(self) -> tuple[float, float]:
        """What to hand to `seconds`, on the same thread."""
        # In this order, and at the end in the other: a wait between the two is then too much in the result
        # and never too little, and of several measurements the shortest is believed.
        began = time.perf_counter()
        return began, self._waited_s()

    def seconds(self, started: tuple[float, float]) -> float:
        began, waited = started
        waited = self._waited_s() - waited
        return max(0.0, time.perf_counter() - began - waited)

    def _waited_s(self) -> float:
        file: FileIO | None = getattr(self._own, "file", None)
        if file is None:
            with contextlib.suppress(OSError):
                file = self._own.file = FileIO(self._path)  # closed when its thread ends
        if file is None:
            return 0.0
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(os.pread(file.fileno(), 96, 0).split()[1]) / 1e9
        return 0.0
