"""The asking side: deadlines, retries with the same correlation id, reassembly of chunked answers."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from edge_teacher.contract import PROTOCOL, frame, topics
from edge_teacher.contract.errors import (
    Busy,
    Malformed,
    RpcError,
    Unreachable,
    error_from_code,
)
from edge_teacher.contract.limits import MIB
from edge_teacher.contract.messages import Chunk, Control, Problem
from edge_teacher.rpc.chunks import Reassembly
from edge_teacher.rpc.transport import Message, Transport

log = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=msgspec.Struct)

RETRY_S = 5.0
"""Silence after which a request is sent again, or the missing ranges of an answer are asked for."""

TICK_S = 0.2
"""How often deadlines and retries are looked at."""


@dataclass
class WireBytes:
    """Payload bytes, by direction. MQTT's own few bytes per packet are not counted."""

    sent: int = 0
    received: int = 0


@dataclass
class _Pending:
    device: str
    method: str
    request: Message
    deadline: float
    next_try: float
    future: Future[bytes]
    parts: Reassembly | None = None
    silent_tries: int = 0
    """Tries since the last piece of an answer came."""
    busy: Busy | None = None
    """What the device said last, if it was that."""


class Caller:
    """Asks devices over one Transport. Thread-safe: any number of requests may be outstanding."""

    def __init__(
        self,
        transport: Transport,
        name: str,
        *,
        max_answer_bytes: int = 512 * MIB,
        retry_s: float = RETRY_S,
        tick_s: float = TICK_S,
    ) -> None:
        """`name`: the coordinator's id. Raises UsageError for an unusable one."""
        self.wire: dict[str, dict[str, WireBytes]] = defaultdict(lambda: defaultdict(WireBytes))
        self._transport = transport
        self._name = name
        self._max_answer_bytes = max_answer_bytes
        self._retry_s = retry_s
        self._tick_s = tick_s
        self._pending: dict[bytes, _Pending] = {}
        self._lock = threading.Lock()
        self._gone: dict[str, str] = {}
        self._closed = threading.Event()
        transport.subscribe(topics.responses(name), self._on_response)
        self._watch = threading.Thread(target=self._watch_deadlines, name="rpc-watch", daemon=True)
        self._watch.start()

    def submit(
        self,
        device: str,
        method: str,
        body: msgspec.Struct,
        tensors: Mapping[str, frame.Array] | None = None,
        *,
        timeout_s: float = 60,
    ) -> Future[bytes]:
        """Send a request; the future holds the answer's frame, or raises an RpcError."""
        correlation = secrets.token_bytes(16)
        request = Message(
            topic=topics.request(device, method),
            payload=frame.encode(body, tensors),
            response_topic=topics.response(self._name, device),
            correlation=correlation,
            expiry_s=math.ceil(timeout_s),
            user={"v": PROTOCOL, "src": self._name},
        )
        now = time.monotonic()
        future: Future[bytes] = Future()
        # A future that somebody else could cancel could not be given its outcome any more.
        future.set_running_or_notify_cancel()
        pending = _Pending(device, method, request, now + timeout_s, now + self._retry_s, future)
        with self._lock:
            if self._closed.is_set():
                raise Unreachable("this connection is closed")
            if device in self._gone:
                raise Unreachable(f"{device} {self._gone[device]} before it was asked for {method}")
            self._pending[correlation] = pending
        try:
            self._send(pending)
        except BaseException:
            with self._lock:
                self._pending.pop(correlation, None)
            raise
        return future

    def call(
        self,
        device: str,
        method: str,
        body: msgspec.Struct,
        tensors: Mapping[str, frame.Array] | None = None,
        *,
        answer: type[Reply],
        timeout_s: float = 60,
    ) -> tuple[Reply, dict[str, frame.Array]]:
        """Ask and wait. Raises the RpcError the device sent, or Unreachable."""
        future = self.submit(device, method, body, tensors, timeout_s=timeout_s)
        try:
            # The watch thread ends the future; the margin only guards against a dead thread.
            return frame.decode(future.result(timeout_s + 5), answer)
        except FutureTimeout as error:
            raise Unreachable(f"{device} did not answer {method} in {timeout_s:g} s") from error
        except BaseException:
            self._cancel(device, future)
            raise

    def device_gone(self, device: str, why: str) -> None:
        """Fail everything asked of a device that will not answer any more, until it is back."""
        with self._lock:
            self._gone[device] = why
            lost = [p for p in self._pending.values() if p.device == device]
            for pending in lost:
                del self._pending[pending.request.correlation]
        for pending in lost:
            pending.future.set_exception(
                Unreachable(f"{device} {why} while it was asked for {pending.method}")
            )

    def device_back(self, device: str) -> None:
        """The device may be asked again."""
        with self._lock:
            self._gone.pop(device, None)

    def close(self) -> None:
        self._closed.set()
        self._watch.join()
        with self._lock:
            lost = list(self._pending.values())
            self._pending.clear()
        for pending in lost:
            pending.future.set_exception(Unreachable("the coordinator closed its connection"))

    # ── sending ──────────────────────────────────────────────────────────────────────────────

    def _send(self, pending: _Pending) -> None:
        self._count(pending, sent=len(pending.request.payload))
        # A retry is worth only what is left: later, nobody waits for what it would compute.
        left = max(1, math.ceil(pending.deadline - time.monotonic()))
        self._transport.publish(replace(pending.request, expiry_s=left))

    def _count(self, pending: _Pending, *, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            counted = self.wire[pending.device][pending.method]
            counted.sent += sent
            counted.received += received

    def _control(self, pending: _Pending, control: Control) -> None:
        payload = frame.encode(control)
        self._count(pending, sent=len(payload))
        self._transport.publish(
            Message(topic=topics.control(pending.device), payload=payload, expiry_s=30)
        )

    def _cancel(self, device: str, future: Future[bytes]) -> None:
        """Tell the device that nobody waits any more; a future already answered is left alone."""
        with self._lock:
            found = next((p for p in self._pending.values() if p.future is future), None)
            if found is not None:
                del self._pending[found.request.correlation]
        if found is not None:
            request = found.request
            self._control(
                found,
                Control(
                    kind="cancel",
                    correlation=request.correlation,
                    respond_to=request.response_topic,
                ),
            )

    # ── receiving, on the connection's thread ────────────────────────────────────────────────

    def _on_response(self, message: Message) -> None:
        with self._lock:
            pending = self._pending.get(message.correlation)
        if pending is None or message.topic != pending.request.response_topic:
            return
        self._count(pending, received=len(message.payload))
        try:
            payload = self._whole(pending, message)
        except Busy as error:
            # Within the deadline a busy device is asked again; the answer is all the caller wants.
            pending.busy = error
            pending.next_try = time.monotonic() + (error.retry_after_s or 1.0)
        except RpcError as error:
            self._finish(pending, error)
        else:
            if payload is not None:
                self._finish(pending, payload)

    def _whole(self, pending: _Pending, message: Message) -> bytes | None:
        """The answer's frame once it is complete. Raises what the device answered instead."""
        status = message.user.get("status", "")
        if status == "200":
            return message.payload
        if status != "206":
            problem, _ = frame.decode(message.payload, Problem)
            raise error_from_code(problem.code, problem.message, problem.retry_after_s)
        try:
            chunk, tensors = frame.decode(message.payload, Chunk)
            data = frame.tensor(tensors, "data", "u8", None)
            # Asked anew, a device that has dropped its answer gives another one, from its beginning.
            anew = pending.silent_tries > 1
            if pending.parts is None or (anew and not pending.parts.owns(chunk)):
                pending.parts = Reassembly(chunk, self._max_answer_bytes)
        except Malformed as error:
            log.warning("dropped a damaged chunk from %s: %s", pending.device, error)
            return None  # it stays missing, and is asked for again
        if not pending.parts.add(chunk, data):
            return None
        pending.silent_tries = 0
        pending.next_try = time.monotonic() + self._retry_s
        if pending.parts.missing:
            request = pending.request
            self._control(
                pending,
                Control(
                    kind="credit",
                    correlation=request.correlation,
                    respond_to=request.response_topic,
                    credits=1,
                ),
            )
            return None
        try:
            return pending.parts.whole()
        except Malformed:
            pending.parts = None  # all of it again
            pending.next_try = 0
            return None

    def _finish(self, pending: _Pending, outcome: bytes | RpcError) -> None:
        with self._lock:
            if self._pending.pop(pending.request.correlation, None) is None:
                return
        if isinstance(outcome, RpcError):
            pending.future.set_exception(outcome)
        else:
            pending.future.set_result(outcome)

    # ── time ─────────────────────────────────────────────────────────────────────────────────

    def _watch_deadlines(self) -> None:
        while not self._closed.wait(self._tick_s):
            now = time.monotonic()
            with self._lock:
                waiting = list(self._pending.values())
            for pending in waiting:
                if now >= pending.deadline:
                    seconds = pending.request.expiry_s
                    silence = f"{pending.device} did not answer {pending.method} within {seconds} s"
                    self._finish(pending, pending.busy or Unreachable(silence))
                elif now >= pending.next_try:
                    pending.next_try = now + self._retry_s
                    self._try_again(pending)

    def _try_again(self, pending: _Pending) -> None:
        # The missing ranges and the whole question take turns: a device that has restarted, or has
        # dropped the answer, does not know the ranges any more.
        ranges = pending.silent_tries % 2 == 0
        pending.silent_tries += 1
        pending.busy = None
        try:
            if ranges and pending.parts is not None and pending.parts.missing:
                request = pending.request
                self._control(
                    pending,
                    Control(
                        kind="resend",
                        correlation=request.correlation,
                        respond_to=request.response_topic,
                        ranges=pending.parts.missing[:16],
                    ),
                )
            else:
                self._send(pending)
        except RpcError as error:
            self._finish(pending, error)
