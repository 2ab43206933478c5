"""The asking side: deadlines, retries with the same correlation id, reassembly of chunked answers."""

from __future__ import annotations

import logging
import math
import random
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from itertools import repeat
from typing import TypeVar

import msgspec

from edge_teacher.contract import PROTOCOL, frame, topics
from edge_teacher.contract.errors import (
    Busy,
    RpcError,
    TooLarge,
    Unreachable,
    error_from_code,
)
from edge_teacher.contract.frame import Payload
from edge_teacher.contract.limits import BULK_ABOVE_BYTES, MIB
from edge_teacher.contract.messages import Control, Problem
from edge_teacher.contract.versions import BULK_SINCE, minor_of
from edge_teacher.rpc.arrivals import arrivals
from edge_teacher.rpc.chunks import MOST_RANGES
from edge_teacher.rpc.detour import Detour
from edge_teacher.rpc.intake import Intake, Memory
from edge_teacher.rpc.pending import Pending, backoff
from edge_teacher.rpc.traffic import Traffic, WireBytes
from edge_teacher.rpc.transport import Message, Transport

log = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=msgspec.Struct)
Tensors = frame.Tensors

RETRY_S = 5.0
"""Silence after which a request is sent again, or the missing ranges of an answer are asked for."""

TICK_S = 0.2
"""How often deadlines and retries are looked at."""

_LONGEST_S = 1e9
"""MQTT's expiry has 32 bits."""

OUTSTANDING = 16
"""Questions on their way to one device; further ones wait here, where they cost the device nothing."""


class Caller:
    """Asks devices over one Transport, or two. Thread-safe: any number of requests may be waiting."""

    def __init__(
        self,
        transport: Transport,
        name: str,
        *,
        bulk: Transport | None = None,
        max_answer_bytes: int = 512 * MIB,
        max_memory_bytes: int = 1024 * MIB,
        outstanding: int = OUTSTANDING,
        retry_s: float = RETRY_S,
        tick_s: float = TICK_S,
    ) -> None:
        """`name`: the coordinator's id. Raises UsageError for an unusable one.

        `bulk`: a second connection for chunks and large requests; none: the same one.
        `max_answer_bytes` bounds one answer, and what the answers of one device take while they are put
        together; `max_memory_bytes` all of them. An answer beyond the first is TooLarge, one beyond the
        second waits for the others.
        """
        self.traffic = Traffic()
        self._transport = transport
        self._bulk = bulk or transport
        self._name = name
        self._most_bytes = min(max_answer_bytes, max_memory_bytes)
        self._memory = Memory(max_memory_bytes, self._most_bytes)
        self._intake = Intake(self._most_bytes, self._memory, self.traffic, self._control, retry_s)
        self._outstanding = outstanding
        self._retry_s = retry_s
        self._tick_s = tick_s
        self._pending: dict[bytes, Pending] = {}
        self._unsent: dict[str, deque[Pending]] = defaultdict(deque)
        self._at_device: dict[str, int] = defaultdict(int)
        self._minors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._gone: dict[str, str] = {}
        self._missing: dict[str, tuple[float, str]] = {}
        """Devices that may be back in a moment, with the time at which they are given up, and why."""
        self._closed = threading.Event()
        transport.subscribe(topics.responses(name), self._on_response)
        self._bulk.subscribe(topics.all_data(name), self._on_response)
        self._detour = Detour(transport, self._bulk, topics.all_data(name), self._on_response)
        self._watch = threading.Thread(target=self._watch_deadlines, name="rpc-watch", daemon=True)
        self._watch.start()
        for connection in {id(t): t for t in (transport, self._bulk)}.values():
            connection.on_connect(self._ask_again)

    @property
    def wire(self) -> dict[str, dict[str, WireBytes]]:
        """Device to method to payload bytes."""
        return self.traffic.bytes

    def submit(
        self,
        device: str,
        method: str,
        body: msgspec.Struct,
        tensors: Tensors | None = None,
        *,
        timeout_s: float = 60,
        packed: bool = False,
    ) -> Future[Payload]:
        """Send a request; the future holds the answer's frame, or raises an RpcError.

        `packed`: the answer's tensors may come packed with zstd. Give the future to `cancel` when
        nobody waits for it any more.
        """
        timeout_s = min(timeout_s, _LONGEST_S)
        correlation = secrets.token_bytes(16)
        user = {"v": PROTOCOL, "src": self._name} | ({"accept": "zstd"} if packed else {})
        request = Message(
            topic=topics.request(device, method),
            payload=frame.encode(body, tensors),
            response_topic=topics.response(self._name, device),
            correlation=correlation,
            expiry_s=math.ceil(timeout_s),
            user=user,
        )
        future: Future[Payload] = Future()
        # A future that somebody else could cancel could not be given its outcome any more.
        future.set_running_or_notify_cancel()
        pending = Pending(device, method, request, time.monotonic() + timeout_s, future)
        with self._lock:
            if self._closed.is_set():
                raise Unreachable("this connection is closed")
            if device in self._gone:
                raise Unreachable(f"{device} {self._gone[device]} before it was asked for {method}")
            self._pending[correlation] = pending
            if self._at_device[device] >= self._outstanding:
                self._unsent[device].append(pending)
                return future
            self._count_as_sent(pending)
        try:
            self._send(pending)
        except BaseException:
            self._send_due(self._release(pending)[1])
            raise
        return future

    def call(
        self,
        device: str,
        method: str,
        body: msgspec.Struct,
        tensors: Tensors | None = None,
        *,
        answer: type[Reply],
        timeout_s: float = 60,
        packed: bool = False,
    ) -> tuple[Reply, dict[str, frame.Array]]:
        """Ask and wait. Raises the RpcError the device sent, or Unreachable."""
        future = self.submit(device, method, body, tensors, timeout_s=timeout_s, packed=packed)
        try:
            # The watch thread ends the future; the margin only guards against a dead thread.
            payload = future.result(timeout_s + 5)
        except FutureTimeout as error:
            raise Unreachable(f"{device} did not answer {method} in {timeout_s:g} s") from error
        except BaseException:
            self.cancel(future)
            raise
        return self.decode(payload, answer)

    def decode(self, payload: Payload, kind: type[Reply]) -> tuple[Reply, dict[str, frame.Array]]:
        """An answer's message and tensors. Raises Malformed."""
        return frame.decode(payload, kind, most_unpacked_bytes=self._most_bytes)

    def answers(
        self,
        device: str,
        method: str,
        bodies: Iterable[msgspec.Struct],
        along: Iterable[Tensors] | None = None,
        *,
        outstanding: int = 2,
        timeout_s: float = 60,
        packed: bool = False,
    ) -> Generator[tuple[int, Future[Payload]], None, None]:
        """(number of the question, its finished future), as the answers come; see `arrivals`.

        From `along` come the tensors that go with each body.
        """
        nothing: Iterable[Tensors] = repeat({})
        return arrivals(
            lambda asked: self.submit(device, method, *asked, timeout_s=timeout_s, packed=packed),
            self.cancel,
            zip(bodies, nothing if along is None else along, strict=along is not None),
            outstanding=outstanding,
        )

    def cancel(self, future: Future[Payload]) -> None:
        """Nobody waits for it any more, and the device is told. One already answered is left alone."""
        with self._lock:
            found = next((p for p in self._pending.values() if p.future is future), None)
        if found is not None:
            self._withdraw(found, Unreachable(f"{found.method} was cancelled before its answer"))

    def device_gone(self, device: str, why: str, *, grace_s: float = 0) -> None:
        """Fail everything asked of a device that will not answer any more, until it is back.

        With `grace_s`: only if it is not back by then; what it is asked meanwhile waits for it.
        """
        if grace_s:
            with self._lock:
                self._missing[device] = (time.monotonic() + grace_s, why)
            return
        with self._lock:
            self._missing.pop(device, None)
            self._gone[device] = why
            lost = [p for p in self._pending.values() if p.device == device]
        for pending in lost:
            self._finish(
                pending, Unreachable(f"{device} {why} while it was asked for {pending.method}")
            )

    def device_back(self, device: str) -> None:
        """The device may be asked again: also what was on its way when its connection broke."""
        with self._lock:
            self._gone.pop(device, None)
            self._missing.pop(device, None)
        self._ask_again(device)

    def close(self) -> None:
        self._closed.set()
        self._watch.join()
        with self._lock:
            lost = list(self._pending.values())
        for pending in lost:
            self._finish(pending, Unreachable("the coordinator closed its connection"))

    # ── sending ──────────────────────────────────────────────────────────────────────────────

    def _count_as_sent(self, pending: Pending) -> None:
        pending.sent = True
        pending.sent_at = time.monotonic()
        pending.next_try = pending.sent_at + backoff(self._retry_s, 0)
        self._at_device[pending.device] += 1

    def _send(self, pending: Pending) -> None:
        request = pending.request
        self.traffic.count(pending.device, pending.method, sent=len(request.payload))
        # A retry is worth only what is left: later, nobody waits for what it would compute.
        left = max(1, math.ceil(pending.deadline - time.monotonic()))
        large = len(request.payload) > BULK_ABOVE_BYTES
        # An acknowledgement proves no delivery, only the answer does: the first try goes without,
        # which makes a round trip a third faster.
        qos = 0 if pending.first_try and not large and self._transport.connected else 1
        pending.first_try = False
        # In vain once, or with one's own second connection away, it takes the way that control takes.
        apart = not pending.tries and self._bulk.connected
        if large and apart and self._minors.get(pending.device, 0) >= BULK_SINCE:
            topic = topics.put(pending.device, pending.method)
            self._bulk.publish(replace(request, topic=topic, expiry_s=left))
        else:
            self._transport.publish(replace(request, expiry_s=left, qos=qos))

    def _control(self, pending: Pending, control: Control, *, qos: int = 1) -> None:
        payload = frame.encode(control)
        self.traffic.count(pending.device, pending.method, sent=len(payload))
        topic = topics.control(pending.device)
        self._transport.publish(Message(topic=topic, payload=payload, expiry_s=30, qos=qos))

    def _withdraw(self, pending: Pending, why: RpcError) -> None:
        if self._finish(pending, why) and pending.sent:
            self._control(pending, pending.control("cancel"))

    # ── receiving, on a connection's thread ──────────────────────────────────────────────────

    def _on_response(self, message: Message) -> None:
        with self._lock:
            pending = self._pending.get(message.correlation)
        if pending is None or message.topic not in (
            pending.request.response_topic,
            topics.data(self._name, pending.device),
        ):
            return
        self.traffic.count(pending.device, pending.method, received=len(message.payload))
        try:
            self._minors[pending.device] = minor_of(message.user.get("v", ""), pending.device)
            payload = self._whole(pending, message)
        except Busy as error:
            # Within the deadline a busy device is asked again; the answer is all the caller wants.
            pending.busy = error
            again = (error.retry_after_s or 1.0) * random.uniform(1.0, 1.5)
            pending.next_try = time.monotonic() + again
        except TooLarge as error:
            self._withdraw(pending, error)
        except RpcError as error:
            self._finish(pending, error)
        else:
            if payload is not None:
                self._finish(pending, payload)

    def _whole(self, pending: Pending, message: Message) -> Payload | None:
        """The answer's frame once it is complete. Raises what the device answered instead."""
        status = message.user.get("status", "")
        if status == "200":
            self._measure_request(pending, message)
            return message.payload
        if status != "206":
            problem, _ = frame.decode(message.payload, Problem)
            raise error_from_code(problem.code, problem.message, problem.retry_after_s)
        whole = self._intake.take(pending, message.payload)
        if whole is not None and self._minors.get(pending.device, 0) >= BULK_SINCE:
            self._control(pending, pending.control("done"))
        return whole

    def _measure_request(self, pending: Pending, message: Message) -> None:
        """How fast a request went over the wire: without what the device says it spent on it."""
        try:
            spent_s = float(message.user.get("ms", "nan")) / 1e3
        except ValueError:
            return
        took = time.monotonic() - pending.sent_at - spent_s
        # One that was tried twice was lost, or waited: that says nothing of the link.
        if pending.tries == 0 and pending.busy is None and spent_s >= 0:
            self.traffic.measured(pending.device, len(pending.request.payload), took)

    # ── the end of a question ────────────────────────────────────────────────────────────────

    def _finish(self, pending: Pending, outcome: Payload | RpcError) -> bool:
        """False if it had ended already."""
        known, due = self._release(pending)
        if not known:
            return False
        # Before anything is sent for others: whatever becomes of that, this question has its answer.
        if isinstance(outcome, RpcError):
            pending.future.set_exception(outcome)
        else:
            pending.future.set_result(outcome)
        self._send_due(due)
        return True

    def _send_due(self, due: Pending | None) -> None:
        """Send what has waited for its turn; one that cannot be sent gives its turn to the next."""
        while due is not None:
            try:
                self._send(due)
            except RpcError as error:
                failed, due = due, self._release(due)[1]
                failed.future.set_exception(error)
            else:
                return

    def _release(self, pending: Pending) -> tuple[bool, Pending | None]:
        """Give back what it held: (whether it was known, who has now the turn to be sent)."""
        due: Pending | None = None
        with self._lock:
            if self._pending.pop(pending.request.correlation, None) is None:
                return False, None
            unsent = self._unsent[pending.device]
            if not pending.sent:
                unsent.remove(pending)
            else:
                self._at_device[pending.device] -= 1
                if unsent and not self._closed.is_set():
                    due = unsent.popleft()
                    self._count_as_sent(due)
        if self._intake.end(pending):
            with self._lock:
                for other in self._pending.values():
                    if other.waits_for_memory:
                        other.waits_for_memory, other.tries, other.next_try = False, 1, 0.0
        return True, due

    # ── time ─────────────────────────────────────────────────────────────────────────────────

    def _ask_again(self, device: str | None = None) -> None:
        """After a reconnection: what was on its way may be lost, so do not wait for the silence to tell."""
        now = time.monotonic()
        with self._lock:
            for pending in self._pending.values():
                if device not in (None, pending.device):
                    continue
                if pending.sent and not pending.waits_for_memory and pending.busy is None:
                    pending.tries, pending.ask_soon = 0, True
                    pending.next_try = now + random.uniform(0, self._tick_s)

    def _watch_deadlines(self) -> None:
        while not self._closed.wait(self._tick_s):
            try:
                if self._detour.follow():
                    self._ask_again()
            except Exception:
                log.exception("data could not be led around the bulk connection")
            now = time.monotonic()
            with self._lock:
                waiting = list(self._pending.values())
                away = [(d, why) for d, (until, why) in self._missing.items() if now >= until]
            for device, why in away:
                self.device_gone(device, why)
            for pending in waiting:
                try:
                    self._look_at(pending, now)
                except Exception:
                    # One question that cannot be sent must not end the watch over all others.
                    log.exception("asking %s again failed", pending.device)

    def _look_at(self, pending: Pending, now: float) -> None:
        if now >= pending.deadline:
            seconds = pending.request.expiry_s
            silence = f"{pending.device} did not answer {pending.method} within {seconds} s"
            self._withdraw(pending, pending.busy or Unreachable(silence))
        elif now >= pending.next_try and self._transport.connected:
            self._try_again(pending)

    def _try_again(self, pending: Pending) -> None:
        # The missing ranges and the whole question take turns: a device that has restarted, or has
        # dropped the answer, does not know the ranges any more.
        ranges = pending.tries % 2 == 0
        pending.tries += 1
        pending.ask_soon = False
        pending.next_try = time.monotonic() + backoff(self._retry_s, pending.tries // 2)
        pending.busy = None
        try:
            parts = pending.parts
            if ranges and parts is not None and (missing := parts.missing[:MOST_RANGES]):
                pending.allow_again()
                self._control(pending, pending.control("resend", ranges=missing))
            else:
                self._send(pending)
        except RpcError as error:
            self._finish(pending, error)
