"""SIGTERM, SIGINT and SIGHUP as something to wait for: nothing runs inside a signal handler."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from types import FrameType, TracebackType
from typing import Any, Literal

_MEANING: dict[int, Literal["stop", "reload"]] = {
    signal.SIGTERM: "stop",
    signal.SIGINT: "stop",
    signal.SIGHUP: "reload",
}

_Handler = Any  # what signal.signal gives back: a function, a constant or None


class Signals:
    """From entering on, these signals wait in a pipe; they are not lost before somebody asks.

    Python calls a handler between any two instructions of the main thread, also while it holds a lock; an
    Event set there may wait for itself for ever. Here a handler sets a plain attribute, and the interpreter
    writes the number into the pipe (signal.set_wakeup_fd).
    """

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stop = False
        self._before: dict[int, _Handler] = {}
        for number in _MEANING:
            self._before[number] = signal.signal(number, self._note)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._read)
        os.close(self._write)

    def wait(self) -> Literal["stop", "reload"]:
        """Until one of them arrives. Several at once: to stop goes before."""
        while True:
            select.select([self._read], [], [])
            with contextlib.suppress(BlockingIOError):
                meant = {_MEANING.get(number) for number in os.read(self._read, 64)}
                if self._stop:
                    return "stop"
                if "reload" in meant:
                    return "reload"

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if _MEANING[number] == "stop":
            self._stop = True  # not lost even where a storm of others has filled the pipe
