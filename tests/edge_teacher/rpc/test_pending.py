from __future__ import annotations

import time
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_teacher.contract.limits import CHUNK_BYTES
from edge_teacher.contract.messages import Chunk
from edge_teacher.rpc.chunks import WINDOW, Reassembly
from edge_teacher.rpc.intake import Memory
from edge_teacher.rpc.pending import WIDEST_WINDOW, Pending, backoff
from edge_teacher.rpc.transport import Message


def pending(chunks: int) -> Pending:
    made = Pending("d1", "echo", Message(topic="t", payload=b""), 0.0, Future())
    first = Chunk(offset=0, total_bytes=chunks * CHUNK_BYTES, crc32=0, sha256="")
    made.parts = Reassembly(first, 1 << 40)
    made.begin_window()
    return made


def play(made: Pending, speed: float | None) -> tuple[int, int, int]:
    """(chunks that came, most on their way at once, credits in all) of a device that keeps to its credits."""
    assert made.parts is not None
    total = len(made.parts.missing)
    allowed, came, most, credits = min(WINDOW, total), 0, 0, 0
    while came < allowed:
        most = max(most, allowed - came)
        came += 1
        made.parts._missing.popitem()
        due = made.credits_due(speed)
        assert 0 <= due <= WINDOW
        credits += due
        allowed += due
    return came, most, credits


@given(st.integers(1, 60), st.sampled_from([None, 1e5, 1.2e6, 1e7, 1e8, 1e10]))
def test_every_chunk_is_allowed_and_none_too_many(chunks: int, speed: float | None) -> None:
    came, most, credits = play(pending(chunks), speed)
    assert came == chunks
    assert most <= WIDEST_WINDOW
    assert credits == max(0, chunks - WINDOW)


def test_the_window_follows_the_link() -> None:
    assert play(pending(60), 1.2e6)[1] == WINDOW
    assert play(pending(60), 1e9)[1] == WIDEST_WINDOW


def test_lost_credits_are_given_again_after_silence() -> None:
    made = pending(20)
    assert made.parts is not None
    made.parts._missing.popitem()
    assert made.credits_due(1e9) == 2  # and suppose that they are lost
    made.allow_again()
    came, _, _ = play(made, 1e9)
    assert came == 19


@pytest.mark.parametrize(("tries", "factor"), [(0, 1), (1, 2), (2, 4), (3, 8), (4, 8), (50, 8)])
def test_backoff_doubles_up_to_eight_times_and_is_off_the_beat(tries: int, factor: int) -> None:
    found = {backoff(1.0, tries) for _ in range(50)}
    assert len(found) > 40
    assert all(0.75 * factor <= seconds <= 1.25 * factor for seconds in found)


def test_hearing_from_the_device_ends_the_backoff() -> None:
    made = pending(3)
    made.tries, made.next_try = 7, float("inf")
    made.heard(5.0)
    assert made.tries == 0
    assert made.next_try < time.monotonic() + 7


def test_what_still_comes_does_not_put_off_asking_after_a_lost_connection() -> None:
    made = pending(3)
    made.next_try, made.ask_soon = 1.0, True
    made.heard(5.0)
    assert made.next_try == 1.0


class TestMemory:
    def test_of_one_and_of_all(self) -> None:
        memory = Memory(100, 60)
        assert memory.take("a", 60)
        assert not memory.take("a", 1)
        assert memory.take("b", 40)
        assert not memory.take("c", 1)
        memory.give_back("a", 60)
        assert memory.take("c", 60)
        assert memory.taken == 100

    def test_one_cannot_have_more_than_all(self) -> None:
        assert not Memory(10, 1000).take("a", 11)
