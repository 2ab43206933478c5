"""One question that has been asked and not been answered, and when to ask it again."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from edge_teacher.contract.errors import Busy
from edge_teacher.contract.frame import Payload
from edge_teacher.contract.messages import Control
from edge_teacher.rpc.chunks import Reassembly
from edge_teacher.rpc.transport import Message

MOST_DOUBLINGS = 3


def backoff(first_s: float, tries: int) -> float:
    """Seconds until the next try: doubled with each in vain, up to eight times, and a quarter off the beat."""
    return float(first_s * 2 ** min(tries, MOST_DOUBLINGS) * random.uniform(0.75, 1.25))


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
    busy: Busy | None = None
    """What the device said last, if it was that."""
    parts: Reassembly | None = None
    first_chunk_at: float = 0.0
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

    def heard(self, retry_s: float) -> None:
        self.tries = 0
        self.next_try = time.monotonic() + backoff(retry_s, 0)
