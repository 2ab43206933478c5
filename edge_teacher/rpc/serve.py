"""The answering side: a fair, bounded queue, worker threads, duplicates answered once, paced chunks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from edge_teacher.contract import frame, packing, topics
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
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Control
from edge_teacher.contract.versions import minor_of
from edge_teacher.rpc.answer_cache import AnswerCache, Answered
from edge_teacher.rpc.fair_queue import Job, Key
from edge_teacher.rpc.lanes import JointLine, Lane, late, require_in_time
from edge_teacher.rpc.latency import Latencies
from edge_teacher.rpc.line import Engine, Joint, Line
from edge_teacher.rpc.progress import Progress
from edge_teacher.rpc.replies import Replies, as_sent, problem_frame
from edge_teacher.rpc.transport import Message, Transport

log = logging.getLogger(__name__)

_IDLE_S = 1.0
"""How often an idle worker looks for answers that nobody has asked for in time."""


Tensors = frame.Tensors
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
        methods: Mapping[str, Method[Any] | Joint[Any]],
        *,
        limits: Limits,
        allowed: frozenset[str] = frozenset(),
        workers: int = 1,
        engine: Engine | None = None,
        bulk: Transport | None = None,
    ) -> None:
        """`allowed`: the coordinators that may ask; empty means whoever the broker lets through.

        `engine`: what answers the joint methods, on threads of its own, so that an upload does not wait
        for an inference. `bulk`: a second connection for requests that carry much and for chunks; none:
        the same one. Raises ValueError for joint methods without an engine.
        """
        joint = sorted(name for name, method in methods.items() if isinstance(method, Joint))
        if joint and engine is None:
            raise ValueError(f"{', '.join(joint)} need an engine")
        self.counters = Counters()
        self.latencies = Latencies(methods)
        self._transport = transport
        self._bulk = bulk or transport
        self._device = device
        self._methods = methods
        self._limits = limits
        self._allowed = allowed
        self._plain = Lane(limits, workers)
        self._joint = Lane(limits, 1)
        # Apart: uploads that come and go say nothing about an engine that hangs.
        self._progress = [(lane, Progress()) for lane in (self._plain, self._joint)]
        self._known: dict[Key, Job] = {}
        """Waiting, or being computed."""
        self._answers = AnswerCache(limits)
        self._replies = Replies(device, transport, self._bulk)
        self._outbox = self._replies.outbox
        self._lock = threading.Lock()
        self._draining = False
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{i}", daemon=True)
            for i in range(workers)
        ]
        if engine is not None:
            line = JointLine(self._joint, self, transport.together)
            self._threads += [
                threading.Thread(
                    target=_serve_on, args=(engine, line), name=f"engine-{i}", daemon=True
                )
                for i in range(engine.threads)
            ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self._transport.subscribe(topics.control(self._device), self._on_control)
        self._transport.subscribe(topics.requests(self._device), self._on_request)
        self._bulk.subscribe(topics.puts(self._device), self._on_request)

    @property
    def queued(self) -> int:
        return len(self._plain.jobs) + len(self._joint.jobs)

    def stuck(self, longest_s: float) -> str:
        """What makes no progress, as a sentence; empty where all does. See Progress.look."""
        if not self._draining and not all(thread.is_alive() for thread in self._threads):
            return "a worker has ended"
        with self._lock:
            jobs = list(self._known.values())
        looks = [
            progress.look([job for job in jobs if self._lane(job) is lane], longest_s)
            for lane, progress in self._progress
        ]
        return next((problem for problem in looks if problem), "")

    def reconfigure(self, limits: Limits, allowed: frozenset[str]) -> None:
        """Take other limits and other coordinators from the next request on."""
        with self._lock:
            self._limits = limits
            self._allowed = allowed
        for lane in (self._plain, self._joint):
            lane.limit(limits)
        self._answers.limit(limits)

    def drain(self, timeout_s: float = 10) -> None:
        """Answer 503 to what waits and to what comes; finish what is being computed."""
        with self._lock:
            self._draining = True
        for job in self._plain.jobs.close() + self._joint.jobs.close():
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
            self._replies.send(key, done)

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
        lane = self._lane(job)
        full = lane.jobs.put(job)
        if full and (expired := lane.jobs.expired()):
            for old in expired:
                self._known.pop(old.key, None)
                self._say(old.key, late(old))
            full = lane.jobs.put(job)
        if full:
            del self._known[key]
            raise Busy(f"{self._device} has {full}", retry_after_s=lane.retry_after_s())

    def _lane(self, job: Job) -> Lane:
        return self._joint if isinstance(self._methods[job.method], Joint) else self._plain

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
                if self._lane(job).jobs.remove(key) is not None:
                    del self._known[key]
            # Also of one that is not known: on its own connection, a request may come after its end.
            self._answers.finish(key)
        self._outbox.end(key)

    # ── on the workers ───────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        jobs = self._plain.jobs
        while True:
            job = jobs.take(_IDLE_S)
            if job is None:
                if jobs.closed:
                    return
                self._answers.expire()
                self._outbox.keep(self._answers.holds)
                continue
            began = time.monotonic()
            self._answer_or_refuse(job)
            self._plain.took(time.monotonic() - began)

    def _answer_or_refuse(self, job: Job) -> None:
        method = self._methods[job.method]
        assert isinstance(method, Method)
        try:
            require_in_time(job)
            request, tensors, _ = self.content(job)
            job.begun = True
            body, answer_tensors = method.answer(request, tensors)
            del request, tensors
            self.complete(job, body, answer_tensors)
        except Exception as error:  # noqa: BLE001
            self.end_badly(job, error)

    def content(self, job: Job) -> tuple[Any, Tensors, Hashable]:
        """The request, its tensors, and what a joint request is about. Raises Malformed."""
        if job.content is None:
            method = self._methods[job.method]
            request, tensors = frame.decode(job.message.payload, method.request)
            about = method.about(request) if isinstance(method, Joint) else None
            job.content = request, tensors, about
        return job.content

    def complete(self, job: Job, body: msgspec.Struct, tensors: Tensors) -> None:
        """Remember the answer and send it, where anybody still wants it. Raises RpcError."""
        job.content = None
        packed = job.message.user.get("accept") == "zstd" and packing.available()
        payload = frame.encode_parts(body, tensors, packed=packed)
        if payload.nbytes > self._limits.max_answer_bytes:
            raise TooLarge(
                f"the answer would have {payload.nbytes} bytes, and the limit is "
                f"{self._limits.max_answer_bytes}; ask about fewer images at once"
            )
        # A deadline is the asker's word: nobody pins memory for longer than any answer is remembered.
        latest = time.monotonic() + self._limits.answer_cache_s
        done = as_sent(
            payload,
            minor=job.minor,
            command=self._changes(job),
            on_its_way_until=latest if job.deadline is None else min(job.deadline, latest),
        )
        del tensors, payload
        until = job.deadline if job.deadline is not None else time.monotonic() + 60
        if not job.withdrawn and not self._answers.put(job.key, done, wait_until=until):
            raise Expired("other answers on their way took all memory until the deadline")
        with self._lock:
            self._known.pop(job.key, None)
            if job.withdrawn:
                self._answers.finish(job.key)
                return
        self.counters.answered += 1
        self.latencies.add(job.method, time.monotonic() - job.arrived)
        try:
            # It is remembered: if this fails, the retry is answered from there.
            self._replies.send(job.key, done, job=job)
        except Exception:
            log.exception("the answer to %s could not be sent", job.method)

    def end_badly(self, job: Job, error: Exception) -> None:
        """A thread outlives every request; the asker learns what happened."""
        if not isinstance(error, RpcError):
            log.error("%s failed", job.method, exc_info=error)
            error = RuntimeFailed(f"{job.method} failed on {self._device}: {error}")
        try:
            self._failed(job, error)
        except Exception:
            # Not even the refusal could be sent. A worker outlives that too.
            log.exception("the end of %s could not be told", job.method)

    def _changes(self, job: Job) -> bool:
        method = self._methods[job.method]
        return isinstance(method, Method) and method.changes

    def _failed(self, job: Job, error: RpcError) -> None:
        """That a command has failed is what it came to, and no refusal."""
        if job.begun and self._changes(job) and not isinstance(error, Busy):
            raw = problem_frame(error)
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
        self._replies.refuse(key, error)


def _serve_on(engine: Engine, line: Line) -> None:
    while not line.closed:
        try:
            engine.serve(line)
        except Exception:
            log.exception("the engine stopped, and begins again")
