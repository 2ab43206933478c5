"""Chunks on their way: each answer as fast as its receiver's credits allow, several in turn.

Nothing is queued as bytes. What is due are numbers of chunks, cut only when the connection has room for
one more, so that neither a slow link nor a flood of control messages makes memory grow.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_teacher.contract.limits import CHUNK_BYTES
from edge_teacher.rpc import chunks
from edge_teacher.rpc.answer_cache import Answered
from edge_teacher.rpc.chunks import MOST_RANGES, WINDOW
from edge_teacher.rpc.fair_queue import Key
from edge_teacher.rpc.transport import Transport

Publish = Callable[[Key, Answered, bytes], None]


@dataclass
class _Transfer:
    answer: Answered
    next: int = 0
    granted: int = 0
    """Chunks before this one may be sent."""
    again: deque[int] = field(default_factory=deque)
    """Asked for once more."""
    granted_again: int = 0
    """So many of those may be sent."""

    def grant(self, credits: int) -> None:
        """First for what is missing: chunks beyond it can wait, and would be all that comes."""
        again = min(credits, len(self.again) - self.granted_again)
        self.granted_again += again
        end = chunks.count(self.answer.payload.nbytes)
        self.granted = min(end, self.granted + credits - again)

    def take(self) -> int | None:
        if self.granted_again:
            self.granted_again -= 1
            return self.again.popleft()
        if self.next < self.granted:
            self.next += 1
            return self.next - 1
        return None


class Outbox:
    """Thread-safe. Sends on whichever thread makes something due, or makes room."""

    def __init__(self, transport: Transport, publish: Publish) -> None:
        self._transport = transport
        self._publish = publish
        self._transfers: OrderedDict[Key, _Transfer] = OrderedDict()
        self._lock = threading.Lock()
        transport.on_room(self._send)

    def __len__(self) -> int:
        """Answers that are on their way."""
        return len(self._transfers)

    def begin(self, key: Key, answer: Answered) -> None:
        """From the first chunk, also when it had been sent before: the receiver has asked anew."""
        with self._lock:
            granted = min(WINDOW, chunks.count(answer.payload.nbytes))
            self._transfers[key] = _Transfer(answer, granted=granted)
        self._send()

    def credit(self, key: Key, credits: int) -> None:
        with self._lock:
            transfer = self._transfers.get(key)
            if transfer is None:
                return
            transfer.grant(max(0, min(credits, WINDOW)))
        self._send()

    def resend(self, key: Key, answer: Answered, ranges: tuple[tuple[int, int], ...]) -> None:
        """Some of the chunks again, two at once and the others for credits.

        Further credits go on behind them, for what lies before has arrived.
        """
        with self._lock:
            transfer = self._transfers.setdefault(key, _Transfer(answer))
            total = answer.payload.nbytes
            known = [
                offset // CHUNK_BYTES
                for offset, length in ranges
                if 0 <= offset < total
                and offset % CHUNK_BYTES == 0
                and length == min(CHUNK_BYTES, total - offset)
            ]
            transfer.again = deque(dict.fromkeys(known[:MOST_RANGES]))
            transfer.granted_again = min(WINDOW, len(transfer.again))
            transfer.next = max(transfer.next, *(index + 1 for index in transfer.again), 0)
            transfer.granted = max(transfer.granted, transfer.next)
        self._send()

    def end(self, key: Key) -> None:
        """No further chunk of it."""
        with self._lock:
            self._transfers.pop(key, None)

    def keep(self, known: Callable[[Key], bool]) -> None:
        """End all but those."""
        with self._lock:
            for key in [k for k in self._transfers if not known(k)]:
                del self._transfers[key]

    def _send(self) -> None:
        # Without its connection there is no telling; then the credits alone bound what is on its way.
        while self._transport.room or not self._transport.connected:
            with self._lock:
                found = next(
                    (
                        (key, transfer, index)
                        for key, transfer in self._transfers.items()
                        if (index := transfer.take()) is not None
                    ),
                    None,
                )
                if found is None:
                    return
                key, transfer, index = found
                self._transfers.move_to_end(key)
            answer = transfer.answer
            offset = index * CHUNK_BYTES
            length = min(CHUNK_BYTES, answer.payload.nbytes - offset)
            chunk = chunks.cut(answer.payload, offset, length, answer.sha256)
            self._publish(key, answer, chunk)
