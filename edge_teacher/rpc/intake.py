"""Chunks of all open questions into their frames, within bounded memory."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from edge_teacher.contract import frame
from edge_teacher.contract.errors import Malformed
from edge_teacher.contract.frame import Payload
from edge_teacher.contract.messages import Chunk, Control
from edge_teacher.rpc.chunks import Reassembly
from edge_teacher.rpc.pending import Pending, backoff
from edge_teacher.rpc.traffic import Traffic

log = logging.getLogger(__name__)


class Memory:
    """Bytes that answers may take while they are put together: of one device, and of all. Thread-safe."""

    def __init__(self, most_bytes: int, most_of_one_bytes: int) -> None:
        self._left = most_bytes
        self.most_of_one_bytes = min(most_of_one_bytes, most_bytes)
        self._taken: dict[str, int] = {}
        self._lock = threading.Lock()

    def take(self, device: str, count: int) -> bool:
        with self._lock:
            taken = self._taken.get(device, 0)
            if count > self._left or taken + count > self.most_of_one_bytes:
                return False
            self._left -= count
            self._taken[device] = taken + count
            return True

    def give_back(self, device: str, count: int) -> None:
        with self._lock:
            self._left += count
            self._taken[device] -= count
            if not self._taken[device]:
                del self._taken[device]

    @property
    def taken(self) -> int:
        with self._lock:
            return sum(self._taken.values())


class SendControl(Protocol):
    """Sends a message about a question's answer to its device."""

    def __call__(self, pending: Pending, control: Control, *, qos: int = 1) -> None: ...


class Intake:
    """Thread-safe: the chunks of one answer may come on two connections."""

    def __init__(
        self,
        most_bytes: int,
        memory: Memory,
        traffic: Traffic,
        control: SendControl,
        retry_s: float,
    ) -> None:
        """`most_bytes`: of one answer."""
        self._most_bytes = most_bytes
        self._memory = memory
        self._traffic = traffic
        self._control = control
        self._retry_s = retry_s

    def take(self, pending: Pending, payload: Payload) -> Payload | None:
        """The answer's frame, if this chunk was the last of it. Raises TooLarge for an answer too large."""
        try:
            chunk, tensors = frame.decode(payload, Chunk)
            data = frame.tensor(tensors, "data", "u8", None)
            with pending.lock:
                return self._take(pending, chunk, data)
        except Malformed as error:
            log.warning("dropped a damaged chunk from %s: %.200s", pending.device, error)
            return None  # it stays missing, and is asked for again

    def end(self, pending: Pending) -> bool:
        """No further chunk of it is taken; whether that has freed memory."""
        with pending.lock:
            pending.over = True
            held = pending.parts is not None
            self._drop(pending)
        return held

    def _take(self, pending: Pending, chunk: Chunk, data: frame.Array) -> Payload | None:
        if pending.over:
            return None
        if pending.parts is not None and pending.tries > 1 and not pending.parts.owns(chunk):
            # Asked anew, a device that has dropped its answer gives another one, from its beginning.
            self._drop(pending)
        if pending.parts is None and not self._begin(pending, chunk):
            return None
        assert pending.parts is not None
        if not pending.parts.add(chunk, data):
            return None
        pending.heard(self._retry_s)
        if pending.parts.missing:
            if credits := pending.credits_due(self._traffic.speed(pending.device)):
                # Lost, they are made good by the next ranges: no need for an acknowledgement.
                self._control(pending, pending.control("credit", credits=credits), qos=0)
            return None
        try:
            whole = pending.parts.whole()
        except Malformed:
            self._drop(pending)  # all of it again
            pending.tries, pending.next_try = 1, 0.0
            return None
        took = time.monotonic() - pending.first_chunk_at
        self._traffic.measured(pending.device, len(whole) - data.nbytes, took)
        return whole

    def _begin(self, pending: Pending, chunk: Chunk) -> bool:
        """Whether there is memory for this answer now. Raises TooLarge, Malformed."""
        if 1 <= chunk.total_bytes <= self._most_bytes and not self._memory.take(
            pending.device, chunk.total_bytes
        ):
            # Whoever gives memory back lets it in at once; asking again is for a moment missed between.
            pending.waits_for_memory = True
            pending.tries, pending.next_try = 1, time.monotonic() + backoff(self._retry_s, 0)
            return False
        pending.parts = Reassembly(chunk, self._most_bytes)
        pending.begin_window()
        pending.waits_for_memory = False
        return True

    def _drop(self, pending: Pending) -> None:
        if pending.parts is not None:
            self._memory.give_back(pending.device, pending.parts.total_bytes)
            pending.parts = None
