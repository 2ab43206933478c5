"""One question that has been asked and not been answered, and when to ask it again."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from edge_teacher.contract.errors import Busy
from edge_teacher.contract.frame import Payload
from edge_teacher.contract.limits import CHUNK_BYTES
from edge_teacher.contract.messages import Control
from edge_teacher.rpc.chunks import WINDOW, Reassembly
from edge_teacher.rpc.transport import Message

MOST_DOUBLINGS = 3

WINDOW_S = 0.1
"""How long the chunks on their way should keep the link busy."""

WIDEST_WINDOW = 8
"""Chunks on their way at most: what a broker has to hold of one answer."""


def backoff(first_s: float, tries: int) -> float:
    """Seconds until the next try: doubled with each in vain, up to eight times, and a quarter off the beat."""
    return float(first_s * 2 ** min(tries, MOST_DOUBLINGS) * random.uniform(0.75, 1.25))


@dataclass(eq=False)
class Pending:
    """What the asking side keeps of one question."""

    device: str
    method: str
    request: Message
    deadline: float
    future: Future[Payload]
    sent: bool = False
    """Not while too many others are outstanding at the device."""
    sent_at: float = 0.0
    first_try: bool = True
    next_try: float = float("inf")
    tries: int = 0
    """In vain, since the last sign of the device."""
    ask_soon: bool = False
    """A connection was lost, and perhaps a message with it: what still comes does not put it off."""
    busy: Busy | None = None
    """What the device said last, if it was that."""
    parts: Reassembly | None = None
    first_chunk_at: float = 0.0
    allowed: int = 0
    """Chunks the device may send, by the credits it has been given, and those it needs none for."""
    came: int = 0
    waits_for_memory: bool = False
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of `parts`: chunks may come on two connections."""

    def control(self, kind: str, **more: object) -> Control:
        """A message about this question's answer."""
        return Control(
            kind=kind,  # type: ignore[arg-type]
            correlation=self.request.correlation,
            respond_to=self.request.response_topic,
            **more,  # type: ignore[arg-type]
        )

    def begin_window(self) -> None:
        self.first_chunk_at = time.monotonic()
        self.allowed, self.came = WINDOW, 0

    def allow_again(self) -> None:
        """After silence: of what was allowed and did not come, nothing may be on its way any more."""
        self.allowed = self.came + WINDOW

    def credits_due(self, bytes_per_s: float | None) -> int:
        """For the chunk that has just come: as many as keep the link busy for WINDOW_S, and no more."""
        self.came += 1
        if self.parts is None:
            return 0
        seconds = time.monotonic() - self.first_chunk_at
        speed = bytes_per_s or (self.came * CHUNK_BYTES / seconds if self.came > 2 else 0.0)
        window = min(WIDEST_WINDOW, max(WINDOW, int(speed * WINDOW_S / CHUNK_BYTES)))
        on_their_way = max(0, self.allowed - self.came)
        due = min(WINDOW, window - on_their_way, len(self.parts.missing) - on_their_way)
        self.allowed += max(0, due)
        return max(0, due)

    def heard(self, retry_s: float) -> None:
        self.tries = 0
        if not self.ask_soon:
            self.next_try = time.monotonic() + backoff(retry_s, 0)
