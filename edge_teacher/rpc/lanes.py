"""The lanes of a server: what waits for the same threads, and a joint one as its engine sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import msgspec

from edge_teacher.contract import frame
from edge_teacher.contract.errors import Expired, Malformed, RpcError
from edge_teacher.contract.limits import Limits
from edge_teacher.rpc.fair_queue import FairQueue, Job
from edge_teacher.rpc.line import Asked

_RETRY_AFTER_S = (0.05, 30.0)
_UNKNOWN_SERVICE_S = 1.0

Tensors = frame.Tensors


class Lane:
    """What waits for the same threads, and how long one of it takes them."""

    def __init__(self, limits: Limits, threads: int) -> None:
        self.jobs = FairQueue(limits.max_queued_requests, limits.max_queued_per_coordinator)
        self.service_s: float | None = None
        self._threads = max(1, threads)
        self._last_end = 0.0
        self._lock = threading.Lock()

    def limit(self, limits: Limits) -> None:
        """Other limits, for what comes from now on."""
        self.jobs.limit(limits.max_queued_requests, limits.max_queued_per_coordinator)

    def took(self, seconds: float) -> None:
        before = self.service_s
        self.service_s = seconds if before is None else before * 0.8 + seconds * 0.2

    def ended(self, began: float) -> None:
        """One of several computed together: it took the time since the last ended, or it began."""
        now = time.monotonic()
        with self._lock:
            seconds, self._last_end = now - max(began, self._last_end), now
            self.took(seconds)

    def retry_after_s(self) -> float:
        """When half of what waits will have been computed, by the time the last ones took."""
        each = self.service_s if self.service_s is not None else _UNKNOWN_SERVICE_S
        least, most = _RETRY_AFTER_S
        wait = each * max(1.0, len(self.jobs) / 2) / self._threads
        return round(min(most, max(least, wait)), 3)


class Ends(Protocol):
    """Who reads the requests of a lane, and tells what became of them."""

    def content(self, job: Job) -> tuple[Any, Tensors, Hashable]: ...

    def complete(self, job: Job, body: msgspec.Struct, tensors: Tensors) -> None: ...

    def end_badly(self, job: Job, error: Exception) -> None: ...


class JointLine:
    """Implements `Line`."""

    def __init__(
        self,
        lane: Lane,
        ends: Ends,
        together: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._lane = lane
        self._ends = ends
        self._together = together

    @property
    def closed(self) -> bool:
        return self._lane.jobs.closed

    def together(self) -> AbstractContextManager[None]:
        return self._together()

    def take(self, timeout_s: float, without: Container[str] = ()) -> Asked | None:
        while (job := self._lane.jobs.take(timeout_s, without)) is not None:
            try:
                require_in_time(job)
                return _Taken(self._lane, self._ends, job)
            except RpcError as error:
                self._ends.end_badly(job, error)
        return None

    def take_all(self, about: Hashable) -> list[Asked]:
        def is_wanted(job: Job) -> bool:
            try:
                content = job.content or self._ends.content(job)
            except Malformed:
                return False  # it is told so when its turn comes
            return content[2] == about and not _is_late(job)

        found = self._lane.jobs.take_all(is_wanted)
        return [_Taken(self._lane, self._ends, job) for job in found]


class _Taken:
    """Implements `Asked`."""

    def __init__(self, lane: Lane, ends: Ends, job: Job) -> None:
        """Raises Malformed for what cannot be read."""
        self.job = job
        self.request, self.tensors, self.about = ends.content(job)
        self._lane = lane
        self._ends = ends
        self._began = time.monotonic()
        job.begun = True

    @property
    def wanted(self) -> bool:
        return not self.job.withdrawn and not _is_late(self.job)

    def answer(self, body: msgspec.Struct, tensors: Tensors) -> None:
        try:
            self._ends.complete(self.job, body, tensors)
        except Exception as error:  # noqa: BLE001
            self._ends.end_badly(self.job, error)
        self._lane.ended(self._began)

    def refuse(self, error: Exception) -> None:
        self._ends.end_badly(self.job, late(self.job) if _is_late(self.job) else error)


def require_in_time(job: Job) -> None:
    """Raises Expired."""
    if _is_late(job):
        raise late(job)


def late(job: Job) -> Expired:
    return Expired(f"the request waited longer than its {job.message.expiry_s} s")


def _is_late(job: Job) -> bool:
    return job.deadline is not None and time.monotonic() > job.deadline
