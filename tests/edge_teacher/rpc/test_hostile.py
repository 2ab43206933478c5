"""Nothing that arrives ends a thread, and nothing makes memory grow."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_teacher.rpc.paho_client import read_publish
from tests.edge_teacher.rpc.hostile import Hostile, Target


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    target = Target()
    yield target
    target.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_hostile_messages_at_both_ends(target: Target, chance: random.Random) -> None:
    hostile = Hostile(chance)
    for _ in range(10):
        target.attack(hostile)
    target.survived()


def test_some_thousands_of_them_leave_no_thread_behind(target: Target) -> None:
    hostile = Hostile(random.Random(0))
    before = threading.active_count()
    for _ in range(3000):
        target.attack(hostile)
    target.survived()
    assert threading.active_count() == before


@settings(max_examples=500)
@given(st.integers(0x30, 0x3F), st.binary(max_size=60))
def test_a_publish_is_read_or_refused(first: int, packet: bytes) -> None:
    try:
        message, _ = read_publish(first, memoryview(packet))
    except (ValueError, IndexError, struct.error):
        return
    assert len(message.payload) <= len(packet)
