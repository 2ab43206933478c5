from __future__ import annotations

from collections.abc import Callable

import pytest

from edge_teacher.contract import frame
from edge_teacher.contract.limits import CHUNK_BYTES
from edge_teacher.contract.messages import Chunk
from edge_teacher.rpc.answer_cache import Answered
from edge_teacher.rpc.fair_queue import Key
from edge_teacher.rpc.memory import MemoryBroker, MemoryTransport
from edge_teacher.rpc.outbox import Outbox


class Gate(MemoryTransport):
    """A connection with room for so many chunks as it is told."""

    def __init__(self) -> None:
        super().__init__(MemoryBroker(), None)
        self.places = 0
        self._actions: list[Callable[[], None]] = []

    @property
    def room(self) -> bool:
        return self.places > 0

    def on_room(self, action: Callable[[], None]) -> None:
        self._actions.append(action)

    def open(self, places: int) -> None:
        self.places = places
        for action in self._actions:
            action()


A, B = (Key("fedsa/v1/ada/rsp/d1", name) for name in (b"a", b"b"))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def sent(gate: Gate) -> list[tuple[bytes, int]]:
    return []


@pytest.fixture
def outbox(gate: Gate, sent: list[tuple[bytes, int]]) -> Outbox:
    def publish(key: Key, answer: Answered, chunk: bytes) -> None:
        gate.places -= 1
        sent.append((key.correlation, frame.decode(chunk, Chunk)[0].offset // CHUNK_BYTES))

    return Outbox(gate, publish)


def answer(chunks: int) -> Answered:
    payload = bytes(chunks * CHUNK_BYTES)
    return Answered(frame.Encoded((payload,), len(payload)), "sha")


def test_answers_take_turns(gate: Gate, outbox: Outbox, sent: list[tuple[bytes, int]]) -> None:
    for key in (A, B):
        outbox.begin(key, answer(9))
        outbox.credit(key, 1)
    assert sent == []
    gate.open(6)
    assert sent == [(b"a", 0), (b"b", 0), (b"a", 1), (b"b", 1), (b"a", 2), (b"b", 2)]


def test_what_is_not_kept_is_not_sent_any_more(
    gate: Gate, outbox: Outbox, sent: list[tuple[bytes, int]]
) -> None:
    for key in (A, B):
        outbox.begin(key, answer(9))
    outbox.keep(lambda key: key == B)
    gate.open(9)
    assert sent == [(b"b", 0), (b"b", 1)]


def test_credits_bring_first_what_is_missing_and_then_what_was_not_sent_yet(
    gate: Gate, outbox: Outbox, sent: list[tuple[bytes, int]]
) -> None:
    """More may be lost with a connection than the two that a receiver's request brings by itself."""
    gate.open(100)
    large = answer(9)
    outbox.begin(A, large)
    for _ in range(2):
        outbox.credit(A, 2)
    sent.clear()
    lost = tuple((index * CHUNK_BYTES, CHUNK_BYTES) for index in (1, 2, 3, 5))
    outbox.resend(A, large, lost)
    assert sent == [(b"a", 1), (b"a", 2)]
    outbox.credit(A, 1)
    outbox.credit(A, 2)
    assert sent[2:] == [(b"a", 3), (b"a", 5), (b"a", 6)]
    for _ in range(9):
        outbox.credit(A, 2)
    assert sent[5:] == [(b"a", 7), (b"a", 8)]
