"""Whether requests come to an end: what a watchdog asks before it says that all is well."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from edge_teacher.rpc.fair_queue import Job, Key

_TAKEN_WITHIN_S = 60.0
"""A request that waits while nothing is being computed is taken at once by a worker that lives."""


class Progress:
    """Of those who wait for the same threads. Looked at every few seconds, by one thread; it knows nothing of
    who computes, or how many at once."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: dict[Key, tuple[int, float]] = {}
        """Of each request that is being computed: its steps, and when they were first seen to be so many."""
        self._waited_in_vain_since: float | None = None

    def look(self, jobs: Iterable[Job], longest_s: float) -> str:
        """What does not get on, as a sentence; empty where all is well.

        `jobs`: all that wait or are being computed at this moment. One that is computed for more than
        `longest_s` without a step is taken for hung, and so is whoever should take those that wait.
        """
        now = self._clock()
        known = list(jobs)
        begun = {job.key: job for job in known if job.begun}
        self._begun = {key: self._last_moved(job, now) for key, job in begun.items()}
        for key, (steps, since) in self._begun.items():
            if now - since > longest_s:
                how = "has had no step" if steps else "has been computed"
                what = begun[key].method
                return f"{what} {how} for {now - since:.0f} s, and {longest_s:.0f} s is the limit"
        if begun or not known:
            self._waited_in_vain_since = None
            return ""
        if self._waited_in_vain_since is None:
            self._waited_in_vain_since = now
        for_s = now - self._waited_in_vain_since
        if for_s > _TAKEN_WITHIN_S:
            return f"{len(known)} requests wait, and none has been begun for {for_s:.0f} s"
        return ""

    def _last_moved(self, job: Job, now: float) -> tuple[int, float]:
        seen = self._begun.get(job.key)
        steps = job.steps  # another thread counts on
        return seen if seen is not None and seen[0] == steps else (steps, now)
