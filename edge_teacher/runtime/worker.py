"""One thread for what is prepared while queries are answered."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

_END_S = 5.0
"""A build that does not hear that it is cancelled is not waited for any longer."""


class Worker:
    """Tasks one after the other, on a thread that begins with the first of them."""

    def __init__(self, name: str) -> None:
        self.cancelled = threading.Event()
        """Set by `close`: tasks end as soon as they can."""
        self._name = name
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, task: Callable[[], None]) -> None:
        """Do it later; after `close`, never."""
        with self._lock:
            if self.cancelled.is_set():
                return
            self._tasks.put(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def close(self) -> None:
        with self._lock:
            self.cancelled.set()
            self._tasks.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_END_S)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self.cancelled.is_set():
                continue
            try:
                task()
            except Exception:  # the thread must outlive whatever a runtime raises
                log.exception("%s: a task failed, and is given up", self._name)
