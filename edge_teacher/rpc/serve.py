"""The answering side: a fair, bounded queue, worker threads, duplicates answered once, paced chunks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import msgspec

from edge_teacher.contract import PROTOCOL, frame, packing, topics
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
from edge_teacher.contract.limits import BULK_ABOVE_BYTES, CHUNK_ABOVE_BYTES, Limits
from edge_teacher.contract.messages import Control, Problem
from edge_teacher.contract.versions import BULK_SINCE, minor_of
from edge_teacher.rpc.answer_cache import AnswerCache, Answered
from edge_teacher.rpc.fair_queue import FairQueue, Job, Key
from edge_teacher.rpc.latency import Latencies
from edge_teacher.rpc.outbox import Outbox
from edge_teacher.rpc.progress import Progress
from edge_teacher.rpc.transport import Message, Transport

log = logging.getLogger(__name__)

_IDLE_S = 1.0
"""How often an idle worker looks for answers that nobody has asked for in time."""

_RETRY_AFTER_S = (0.05, 30.0)
_UNKNOWN_SERVICE_S = 1.0

Tensors = Mapping[str, frame.Array]
Answer = tuple[msgspec.Struct, Tensors]


Request = TypeVar("Request", bound=msgspec.Struct)


@dataclass(frozen=True)
class Method(Generic[Request]):
    """How to answer one method: the struct its requests carry, and the function that answers.

    The tensors it returns are sent from where they lie: it must not change them afterwards.
    """

    request: type[Request]
    answer: Callable[[Request, Tensors], Answer]
    changes: bool = False
    """A command: its outcome, which must be small, is remembered whatever else needs the memory, also if it
    failed."""


@dataclass
class Counters:
    answered: int = 0
    refused: int = 0
    failed: int = 0


class Server:
    """Answers `req/<method>` and `put/<method>` of one device. Nothing is computed on a connection's thread."""

    def __init__(
        self,
        transport: Transport,
        device: str,
        methods: Mapping[str, Method[Any]],
        *,
        limits: Limits,
        allowed: frozenset[str] = frozenset(),
        workers: int = 1,
        bulk: Transport | None = None,
    ) -> None:
        """`allowed`: the coordinators that may ask; empty means whoever the broker lets through.

        `bulk`: a second connection for requests that carry much and for chunks; none: the same one.
        """
        self.counters = Counters()
        self.latencies = Latencies(methods)
        self._progress = Progress()
        self._transport = transport
        self._bulk = bulk or transport
        self._device = device
        self._methods = methods
        self._limits = limits
        self._allowed = allowed
        self._jobs = FairQueue(limits.max_queued_requests, limits.max_queued_per_coordinator)
        self._known: dict[Key, Job] = {}
        """Waiting, or being computed."""
        self._answers = AnswerCache(limits)
        self._outbox = Outbox(self._bulk, self._publish_chunk)
        self._service_s: float | None = None
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
        self._bulk.subscribe(topics.puts(self._device), self._on_request)

    @property
    def queued(self) -> int:
        return len(self._jobs)

    def stuck(self, longest_s: float) -> str:
        """What makes no progress, as a sentence; empty where all does. See Progress.look."""
        if not self._draining and not all(thread.is_alive() for thread in self._threads):
            return "a worker has ended"
        with self._lock:
            jobs = list(self._known.values())
        return self._progress.look(jobs, longest_s)

    def reconfigure(self, limits: Limits, allowed: frozenset[str]) -> None:
        """Take other limits and other coordinators from the next request on."""
        with self._lock:
            self._limits = limits
            self._allowed = allowed
        self._jobs.limit(limits.max_queued_requests, limits.max_queued_per_coordinator)
        self._answers.limit(limits)

    def drain(self, timeout_s: float = 10) -> None:
        """Answer 503 to what waits and to what comes; finish what is being computed."""
        with self._lock:
            self._draining = True
        for job in self._jobs.close():
            self._refuse(job.key, Draining(f"{self._device} is shutting down"))
        for thread in self._threads:
            thread.join(timeout_s)

    # ── on a connection's thread ─────────────────────────────────────────────────────────────

    def _on_request(self, message: Message) -> None:
        if not topics.may_answer_to(message.response_topic, self._device):
            # There is nowhere safe to say so: the topic given may be another device's.
            log.warning("dropped a request with the response topic %.200r", message.response_topic)
            self.counters.refused += 1
            return
        key = Key(message.response_topic, message.correlation)
        try:
            with self._lock:  # two connections may bring the same request
                if key in self._known or self._answers.is_gone(key):
                    return
                done = self._answers.get(key)
                if done is None:
                    self._admit(key, message)
        except RpcError as error:
            self._refuse(key, error)
            return
        if done is not None:
            self._send(key, done)

    def _admit(self, key: Key, message: Message) -> None:
        parsed = topics.parse(message.topic)
        asker = topics.parse(key.respond_to)
        name = asker.owner if asker else "?"
        if self._allowed and name not in self._allowed:
            raise NotAllowed(
                f"{name} is not among the coordinators "
                f"{self._device} answers; its owner can add it to the configuration"
            )
        minor = minor_of(message.user.get("v", ""), name)
        if parsed is None or parsed.rest not in self._methods:
            known = ", ".join(sorted(self._methods))
            raise NotFound(f"{message.topic!r} names no method; this device answers {known}")
        if not 1 <= len(key.correlation) <= 64:
            raise Malformed(
                f"the correlation data has {len(key.correlation)} bytes, and must have 1 to 64"
            )
        if self._draining:
            raise Draining(f"{self._device} is shutting down")
        now = time.monotonic()
        deadline = None if message.expiry_s is None else now + message.expiry_s
        job = Job(key, name, parsed.rest, message, deadline, now, minor)
        self._known[key] = job
        full = self._jobs.put(job)
        if full and (expired := self._jobs.expired()):
            for late in expired:
                self._known.pop(late.key, None)
                self._say(late.key, _late(late))
            full = self._jobs.put(job)
        if full:
            del self._known[key]
            raise Busy(f"{self._device} has {full}", retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        """When half of what waits will have been computed, by the time the last ones took."""
        each = self._service_s if self._service_s is not None else _UNKNOWN_SERVICE_S
        least, most = _RETRY_AFTER_S
        wait = each * max(1.0, len(self._jobs) / 2) / max(1, len(self._threads))
        return round(min(most, max(least, wait)), 3)

    def _on_control(self, message: Message) -> None:
        try:
            control, _ = frame.decode(message.payload, Control)
        except Malformed as error:
            log.warning("dropped a control message: %.200s", error)
            self.counters.refused += 1
            return
        key = Key(control.respond_to, control.correlation)
        if control.kind == "cancel":
            self._withdraw(key)
        elif control.kind == "done":
            self._outbox.end(key)
            if self._answers.get(key) is not None:
                self._answers.finish(key)
        elif (done := self._answers.get(key)) is not None and done.sha256:
            if control.kind == "credit":
                self._outbox.credit(key, control.credits)
            else:
                self._outbox.resend(key, done, control.ranges)

    def _withdraw(self, key: Key) -> None:
        """Wherever it is: waiting, being computed, remembered, or on its way."""
        with self._lock:
            job = self._known.get(key)
            if job is not None:
                job.withdrawn = True
                if self._jobs.remove(key) is not None:
                    del self._known[key]
            # Also of one that is not known: on its own connection, a request may come after its end.
            self._answers.finish(key)
        self._outbox.end(key)

    # ── on the workers ───────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        while True:
            job = self._jobs.take(_IDLE_S)
            if job is None:
                if self._jobs.closed:
                    return
                self._answers.expire()
                self._outbox.keep(lambda key: self._answers.get(key) is not None)
                continue
            began = time.monotonic()
            try:
                self._answer_or_refuse(job)
            except Exception:
                # Not even the refusal could be sent. A worker outlives that too.
                log.exception("the end of %s could not be told", job.method)
            took = time.monotonic() - began
            before = self._service_s
            self._service_s = took if before is None else before * 0.8 + took * 0.2

    def _answer_or_refuse(self, job: Job) -> None:
        try:
            done = self._answer(job)
        except RpcError as error:
            self._failed(job, error)
        except Exception as error:
            # A worker outlives every request; the asker learns what happened.
            log.exception("%s failed", job.method)
            self._failed(job, RuntimeFailed(f"{job.method} failed on {self._device}: {error}"))
        else:
            if (
                done is not None
            ):  # it is remembered: if this fails, the retry is answered from there
                self._send(job.key, done, job=job)

    def _answer(self, job: Job) -> Answered | None:
        """Compute and remember it; None where nobody wants it any more."""
        if job.deadline is not None and time.monotonic() > job.deadline:
            raise _late(job)
        method = self._methods[job.method]
        request, tensors = frame.decode(job.message.payload, method.request)
        job.begun = True
        body, answer_tensors = method.answer(request, tensors)
        packed = job.message.user.get("accept") == "zstd" and packing.available()
        payload = frame.encode_parts(body, answer_tensors, packed=packed)
        if payload.nbytes > self._limits.max_answer_bytes:
            raise TooLarge(
                f"the answer would have {payload.nbytes} bytes, and the limit is "
                f"{self._limits.max_answer_bytes}; ask about fewer images at once"
            )
        del request, tensors, answer_tensors
        done = self._as_sent(job, payload)
        del payload
        until = job.deadline if job.deadline is not None else time.monotonic() + 60
        if not job.withdrawn and not self._answers.put(job.key, done, wait_until=until):
            raise Expired("other answers on their way took all memory until the deadline")
        with self._lock:
            self._known.pop(job.key, None)
            if job.withdrawn:
                self._answers.finish(job.key)
                return None
        self.counters.answered += 1
        self.latencies.add(job.method, time.monotonic() - job.arrived)
        return done

    def _as_sent(self, job: Job, payload: frame.Encoded) -> Answered:
        if payload.nbytes <= CHUNK_ABOVE_BYTES:
            joined = payload.join()
            small = frame.Encoded((joined,), len(joined))
            command = self._methods[job.method].changes
            return Answered(small, minor=job.minor, of_a_command=command)
        # A deadline is the asker's word: nobody pins memory for longer than any answer is remembered.
        latest = time.monotonic() + self._limits.answer_cache_s
        until = latest if job.deadline is None else min(job.deadline, latest)
        return Answered(payload, payload.sha256(), job.minor, until)

    def _failed(self, job: Job, error: RpcError) -> None:
        """That a command has failed is what it came to, and no refusal."""
        if job.begun and self._methods[job.method].changes and not isinstance(error, Busy):
            raw = frame.encode(_problem(error))
            outcome = Answered(
                frame.Encoded((raw,), len(raw)),
                minor=job.minor,
                status=error.code,
                of_a_command=True,
            )
            self._answers.put(job.key, outcome, wait_until=0.0)
        self._refuse(job.key, error)

    def _refuse(self, key: Key, error: RpcError) -> None:
        """A refusal is not remembered: the same request may be welcome a moment later."""
        with self._lock:
            job = self._known.pop(key, None)
        if job is not None and job.withdrawn:
            self._answers.finish(key)
        else:
            self._say(key, error)

    def _say(self, key: Key, error: RpcError) -> None:
        if isinstance(error, RuntimeFailed):
            self.counters.failed += 1
        else:
            self.counters.refused += 1
        payload = frame.encode(_problem(error))
        self._publish(self._transport, key.respond_to, key, error.code, payload)

    def _send(self, key: Key, done: Answered, *, job: Job | None = None) -> None:
        """`job`: it has just been computed; None: it is asked for again."""
        if done.sha256:
            self._outbox.begin(key, done)
            return
        # If it is lost, the request comes again; only then is the acknowledgement worth its time.
        small = done.payload.nbytes <= BULK_ABOVE_BYTES
        qos = 0 if small and job is not None and self._transport.connected else 1
        # What the asker has to take off before it knows how long the wire took.
        spent = {} if job is None else {"ms": f"{(time.monotonic() - job.arrived) * 1e3:.3f}"}
        payload = done.payload.join()
        self._publish(
            self._transport, key.respond_to, key, done.status, payload, qos=qos, user=spent
        )

    def _publish_chunk(self, key: Key, answer: Answered, chunk: bytes) -> None:
        asker = topics.parse(key.respond_to)
        apart = answer.minor >= BULK_SINCE and asker is not None
        topic = topics.data(asker.owner, self._device) if apart and asker else key.respond_to
        transport = self._bulk if self._bulk.connected else self._transport
        self._publish(transport, topic, key, 206, chunk)

    def _publish(
        self,
        transport: Transport,
        topic: str,
        key: Key,
        status: int,
        payload: bytes,
        *,
        qos: int = 1,
        user: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        transport.publish(
            Message(
                topic=topic,
                payload=payload,
                qos=qos,
                correlation=key.correlation,
                user={"status": str(status), "v": PROTOCOL, "src": self._device, **user},
            )
        )


def _problem(error: RpcError) -> Problem:
    return Problem(code=error.code, message=str(error), retry_after_s=error.retry_after_s)


def _late(job: Job) -> Expired:
    return Expired(f"the request waited longer than its {job.message.expiry_s} s")
