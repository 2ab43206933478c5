"""Whether workers still come round: what a watchdog asks before it says that all is well."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_STUCK_IDLE_S = 60.0
"""An idle worker comes round each second."""


@dataclass(frozen=True)
class _At:
    since: float
    work: str
    """Empty: it waits for work."""
    watched: bool = True


class Progress:
    """Each worker notes what it turns to. Thread-safe: a note replaces the worker's last one."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at: dict[str, _At] = {}

    def waits(self) -> None:
        """The calling worker looks for work."""
        self._note("")

    def begins(self, work: str) -> None:
        """The calling worker turns to `work`."""
        self._note(work)

    def waits_for_another(self) -> None:
        """The calling worker goes on when another does, and that one is watched."""
        self._note("", watched=False)

    def _note(self, work: str, *, watched: bool = True) -> None:
        self._at[threading.current_thread().name] = _At(self._clock(), work, watched)

    def stuck(self, longest_s: float) -> str:
        """The worker that has been at one piece of work for more than `longest_s`, or does not come round
        without any, as a sentence; empty where all is well."""
        now = self._clock()
        for worker, at in list(self._at.items()):
            if not at.watched:
                continue
            for_s = now - at.since
            if at.work and for_s > longest_s:
                return f"{worker} has been at {at.work} for {for_s:.0f} s, and {longest_s:.0f} s is the limit"
            if not at.work and for_s > _STUCK_IDLE_S:
                return f"{worker} has not come round for {for_s:.0f} s"
        return ""
