"""The answering side: bounded queue, worker threads, duplicates answered once, chunks paced by credits."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from edge_teacher.contract import PROTOCOL, frame, topics
from edge_teacher.contract.errors import (
    Busy,
    Draining,
    Expired,
    Malformed,
    NotAllowed,
    NotFound,
    RpcError,
    RuntimeFailed,
    TooLarge,
)
from edge_teacher.contract.limits import CHUNK_ABOVE_BYTES, Limits
from edge_teacher.contract.messages import Control, Problem
from edge_teacher.rpc import chunks
from edge_teacher.rpc.transport import Message, Transport

log = logging.getLogger(__name__)

OUTSTANDING_CHUNKS = 2
"""Chunks sent before the first credit arrives: more would let one answer delay all others."""

Tensors = Mapping[str, frame.Array]
Answer = tuple[msgspec.Struct, Tensors]


Request = TypeVar("Request", bound=msgspec.Struct)


@dataclass(frozen=True)
class Method(Generic[Request]):
    """How to answer one method: the struct its requests carry, and the function that answers."""

    request: type[Request]
    answer: Callable[[Request, Tensors], Answer]


@dataclass(frozen=True)
class _Key:
    """Retries of one request share it."""

    respond_to: str
    correlation: bytes


@dataclass
class _Job:
    key: _Key
    method: str
    message: Message
    deadline: float | None


@dataclass
class _Answered:
    status: int
    payload: bytes
    sha256: str = ""
    next_chunk: int = 0


@dataclass
class Counters:
    answered: int = 0
    refused: int = 0
    failed: int = 0


class Server:
    """Answers `req/<method>` of one device. Nothing is computed on the connection's thread."""

    def __init__(
        self,
        transport: Transport,
        device: str,
        methods: Mapping[str, Method[Any]],
        *,
        limits: Limits,
        allowed: frozenset[str] = frozenset(),
        workers: int = 1,
    ) -> None:
        """`allowed`: the coordinators that may ask; empty means whoever the broker lets through."""
        self.counters = Counters()
        self._transport = transport
        self._device = device
        self._methods = methods
        self._limits = limits
        self._allowed = allowed
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._waiting: set[_Key] = set()
        self._cancelled: set[_Key] = set()
        self._cache: OrderedDict[_Key, _Answered] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._draining = False
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{i}", daemon=True)
            for i in range(workers)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self._transport.subscribe(topics.control(self._device), self._on_control)
        self._transport.subscribe(topics.requests(self._device), self._on_request)

    @property
    def queued(self) -> int:
        return self._jobs.qsize()

    def drain(self, timeout_s: float = 10) -> None:
        """Answer 503 to what waits and to what comes; finish what is being computed."""
        self._draining = True
        self._refuse_queued()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        # What the connection's thread let in while this was beginning.
        self._refuse_queued()

    def _refuse_queued(self) -> None:
        stops = 0
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is None:
                    stops += 1
                else:
                    self._refuse(job.key, Draining(f"{self._device} is shutting down"))
        for _ in range(stops):  # for workers that are still computing
            self._jobs.put(None)

    # ── on the connection's thread ───────────────────────────────────────────────────────────

    def _on_request(self, message: Message) -> None:
        if not topics.may_answer_to(message.response_topic, self._device):
            # There is nowhere safe to say so: the topic given may be another device's.
            log.warning("dropped a request with the response topic %r", message.response_topic)
            self.counters.refused += 1
            return
        key = _Key(message.response_topic, message.correlation)
        with self._lock:
            if (done := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
            elif key in self._waiting:
                return
        if done is not None:
            done.next_chunk = 0
            self._send(key, done)
            return
        try:
            job = self._admit(key, message)
        except RpcError as error:
            self._refuse(key, error)
            return
        with self._lock:
            self._waiting.add(key)
        self._jobs.put(job)

    def _admit(self, key: _Key, message: Message) -> _Job:
        parsed = topics.parse(message.topic)
        asker = topics.parse(key.respond_to)
        if self._allowed and (asker is None or asker.owner not in self._allowed):
            raise NotAllowed(
                f"{asker.owner if asker else '?'} is not among the coordinators "
                f"{self._device} answers; its owner can add it to the configuration"
            )
        if parsed is None or parsed.rest not in self._methods:
            known = ", ".join(sorted(self._methods))
            raise NotFound(f"{message.topic!r} names no method; this device answers {known}")
        if not 1 <= len(key.correlation) <= 64:
            raise Malformed(
                f"the correlation data has {len(key.correlation)} bytes, and must have 1 to 64"
            )
        if self._draining:
            raise Draining(f"{self._device} is shutting down")
        if self._jobs.qsize() >= self._limits.max_queued_requests:
            raise Busy(
                f"{self._device} has {self._jobs.qsize()} requests waiting", retry_after_s=1.0
            )
        deadline = None if message.expiry_s is None else time.monotonic() + message.expiry_s
        return _Job(key, parsed.rest, message, deadline)

    def _on_control(self, message: Message) -> None:
        control, _ = frame.decode(message.payload, Control)
        key = _Key(control.respond_to, control.correlation)
        with self._lock:
            done = self._cache.get(key)
            if control.kind == "cancel" and key in self._waiting:
                self._cancelled.add(key)
        if done is None or not done.sha256:
            return
        if control.kind == "credit":
            self._send_chunks(key, done, max(0, min(control.credits, OUTSTANDING_CHUNKS)))
        elif control.kind == "resend":
            every = {r: i for i, r in enumerate(chunks.ranges(len(done.payload)))}
            for offset, length in [r for r in control.ranges if r in every][:OUTSTANDING_CHUNKS]:
                with self._lock:
                    # What lies before the missing has arrived: the next credit goes on behind it.
                    done.next_chunk = max(done.next_chunk, every[offset, length] + 1)
                self._send_chunk(key, done, offset, length)

    # ── on the workers ───────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._answer(job)
            except RpcError as error:
                self._refuse(job.key, error)
            except Exception as error:
                # A worker outlives every request; the asker learns what happened.
                log.exception("%s failed", job.method)
                self._refuse(
                    job.key, RuntimeFailed(f"{job.method} failed on {self._device}: {error}")
                )

    def _answer(self, job: _Job) -> None:
        if job.deadline is not None and time.monotonic() > job.deadline:
            raise Expired(f"the request waited longer than its {job.message.expiry_s} s")
        if job.key in self._cancelled:
            with self._lock:
                self._forget(job.key)
            return
        method = self._methods[job.method]
        request, tensors = frame.decode(job.message.payload, method.request)
        body, answer_tensors = method.answer(request, tensors)
        payload = frame.encode(body, answer_tensors)
        if len(payload) > self._limits.max_answer_bytes:
            raise TooLarge(
                f"the answer would have {len(payload)} bytes, and the limit is "
                f"{self._limits.max_answer_bytes}; ask about fewer images at once"
            )
        chunked = len(payload) > CHUNK_ABOVE_BYTES
        done = _Answered(200, payload, hashlib.sha256(payload).hexdigest() if chunked else "")
        with self._lock:
            self._forget(job.key)
            self._cache[job.key] = done
            self._cached_bytes += len(payload)
            # The newest stays even when it alone exceeds the budget: its chunks are still to be sent.
            while self._cached_bytes > self._limits.answer_cache_bytes and len(self._cache) > 1:
                _, old = self._cache.popitem(last=False)
                self._cached_bytes -= len(old.payload)
        self.counters.answered += 1
        self._send(job.key, done)

    def _forget(self, key: _Key) -> None:
        self._waiting.discard(key)
        self._cancelled.discard(key)

    def _refuse(self, key: _Key, error: RpcError) -> None:
        """A refusal is not cached: the same request may be welcome a moment later."""
        if isinstance(error, RuntimeFailed):
            self.counters.failed += 1
        else:
            self.counters.refused += 1
        with self._lock:
            self._forget(key)
        problem = Problem(code=error.code, message=str(error), retry_after_s=error.retry_after_s)
        self._publish(key, error.code, frame.encode(problem))

    def _send(self, key: _Key, done: _Answered) -> None:
        if done.sha256:
            self._send_chunks(key, done, OUTSTANDING_CHUNKS)
        else:
            self._publish(key, done.status, done.payload)

    def _send_chunks(self, key: _Key, done: _Answered, credits: int) -> None:
        every = list(chunks.ranges(len(done.payload)))
        with self._lock:
            first = done.next_chunk
            done.next_chunk = min(len(every), first + credits)
            due = every[first : done.next_chunk]
        for offset, length in due:
            self._send_chunk(key, done, offset, length)

    def _send_chunk(self, key: _Key, done: _Answered, offset: int, length: int) -> None:
        self._publish(key, 206, chunks.cut(done.payload, offset, length, done.sha256))

    def _publish(self, key: _Key, status: int, payload: bytes) -> None:
        self._transport.publish(
            Message(
                topic=key.respond_to,
                payload=payload,
                correlation=key.correlation,
                user={"status": str(status), "v": PROTOCOL, "src": self._device},
            )
        )
