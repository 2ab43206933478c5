"""What waits to be computed: one line per coordinator, served in turn, each of bounded length."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass
from typing import Any

from edge_teacher.rpc.transport import Message


@dataclass(frozen=True)
class Key:
    """Retries of one request share it."""

    respond_to: str
    correlation: bytes


@dataclass
class Job:
    key: Key
    asker: str
    method: str
    message: Message
    deadline: float | None
    """On this machine's monotonic clock, counted from the arrival."""
    arrived: float
    """On the same clock."""
    minor: int = 0
    """Of the asker's protocol."""
    begun: bool = False
    """It may have had an effect."""
    steps: int = 0
    """How many steps of its computing have begun or ended: while the number grows, it gets on. Counted by who
    computes."""
    withdrawn: bool = False
    """Cancelled while it was being computed."""
    content: tuple[Any, Any, Hashable] | None = None
    """(request, tensors, what a joint request is about), once they were read."""


class FairQueue:
    """Thread-safe. Who asks a hundred questions does not keep another from being answered second."""

    def __init__(self, most: int, most_per_asker: int) -> None:
        self._most = most
        self._most_per_asker = most_per_asker
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def limit(self, most: int, most_per_asker: int) -> None:
        """Other bounds, for what comes from now on."""
        with self._changed:
            self._most = most
            self._most_per_asker = most_per_asker

    def put(self, job: Job) -> str:
        """Take `job` in: "" if there was a place for it, else why there is none."""
        with self._changed:
            if self._count >= self._most:
                return f"{self._count} requests waiting"
            line = self._lines.get(job.asker)
            if line is not None and len(line) >= self._most_per_asker:
                return f"{len(line)} requests of {job.asker} waiting"
            self._lines.setdefault(job.asker, deque()).append(job)
            self._count += 1
            self._changed.notify()
            return ""

    def take(self, timeout_s: float, without: Container[str] = ()) -> Job | None:
        """The next in turn; None after `timeout_s` without one, or at once when closed and empty.

        `without`: askers whose turn it is not; with them it does not wait.
        """
        with self._changed:
            if not self._count and timeout_s:
                self._changed.wait_for(lambda: self._count or self._closed, timeout_s)
            asker = next((name for name in self._lines if name not in without), None)
            if asker is None:
                return None
            line = self._lines[asker]
            job = line.popleft()
            del self._lines[asker]
            if line:  # behind all others
                self._lines[asker] = line
            self._count -= 1
            return job

    def remove(self, key: Key) -> Job | None:
        """Take the job of `key` out, wherever it stands."""
        with self._changed:
            found = [job for line in self._lines.values() for job in line if job.key == key]
            return self._without(found)[0] if found else None

    def take_all(self, wanted: Callable[[Job], bool]) -> list[Job]:
        """Those that are `wanted`, out of their turn."""
        with self._changed:
            return self._without(
                [job for line in self._lines.values() for job in line if wanted(job)]
            )

    def expired(self) -> list[Job]:
        """Take out everything whose deadline has passed."""
        now = time.monotonic()
        with self._changed:
            return self._without(
                [
                    job
                    for line in self._lines.values()
                    for job in line
                    if job.deadline is not None and job.deadline < now
                ]
            )

    def close(self) -> list[Job]:
        """End every `take`, and hand back what was still waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._without([job for line in self._lines.values() for job in line])

    @property
    def closed(self) -> bool:
        return self._closed

    def _without(self, jobs: list[Job]) -> list[Job]:
        for job in jobs:
            self._lines[job.asker].remove(job)
            if not self._lines[job.asker]:
                del self._lines[job.asker]
        self._count -= len(jobs)
        return jobs
