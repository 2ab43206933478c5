"""Looks whether the agent makes progress, and only then says so to systemd's watchdog."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from edge_teacher.agent.systemd import Notifier

log = logging.getLogger(__name__)

_PERIOD_S = 5.0


class Pulse:
    """A thread of its own, so that whatever hangs elsewhere is seen; it waits for nobody."""

    def __init__(
        self, notify: Notifier, stuck: Callable[[], str], status: Callable[[], str]
    ) -> None:
        """`stuck` says what makes no progress, or nothing; `status` is one line about the service.

        Neither may block.
        """
        self._notify = notify
        self._stuck = stuck
        self._status = status
        watchdog_s = notify.watchdog_s
        # A third: two looks may come late before systemd takes it for dead (it advises half).
        self._period_s = _PERIOD_S if watchdog_s is None else min(_PERIOD_S, watchdog_s / 3)
        self._said = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.look()
            if self._stopped.wait(self._period_s):
                return

    def look(self) -> None:
        """Once: alive and well, or what is stuck."""
        problem = self._stuck()
        if not problem:
            self._notify.alive()
            self._notify.status(self._status())
        else:
            self._notify.status(f"stuck: {problem}")
            if not self._said:
                end = "; systemd will restart it" if self._notify.watchdog_s is not None else ""
                log.critical("no progress: %s%s", problem, end)
        self._said = problem
