from __future__ import annotations

import threading
import time

import pytest

from edge_teacher.contract import frame
from edge_teacher.contract.limits import Limits
from edge_teacher.rpc.answer_cache import AnswerCache, Answered
from edge_teacher.rpc.fair_queue import Key

NOW = 1000.0


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = NOW
        monkeypatch.setattr("edge_teacher.rpc.answer_cache.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def answer(size: int, until: float = 0.0) -> Answered:
    return Answered(
        frame.Encoded((bytes(size),), size), "x" if until else "", on_its_way_until=until
    )


def key(name: str) -> Key:
    return Key("fedsa/v1/ada/rsp/d1", name.encode())


def test_it_forgets_what_nobody_has_asked_for_in_time(clock: Clock) -> None:
    cache = AnswerCache(Limits(answer_cache_s=60))
    for name in "ab":
        assert cache.put(key(name), answer(10), wait_until=NOW)
    clock.now += 50
    assert cache.get(key("a")) is not None  # asked for again: it stays
    clock.now += 50
    assert cache.get(key("a")) is not None
    assert cache.get(key("b")) is None
    assert cache.nbytes == 10
    clock.now += 61
    cache.expire()
    assert cache.nbytes == 0


def test_the_least_recently_used_make_room(clock: Clock) -> None:
    cache = AnswerCache(Limits(answer_cache_bytes=25))
    for name in "ab":
        cache.put(key(name), answer(10), wait_until=NOW)
    cache.get(key("a"))
    cache.put(key("c"), answer(10), wait_until=NOW)
    assert [name for name in "abc" if cache.get(key(name))] == ["a", "c"]


def test_what_is_on_its_way_is_held_until_nobody_waits(clock: Clock) -> None:
    cache = AnswerCache(Limits(answer_cache_bytes=25))
    cache.put(key("large"), answer(100, until=NOW + 30), wait_until=NOW)
    cache.put(key("b"), answer(10), wait_until=NOW)
    assert cache.get(key("large")) is not None
    assert cache.get(key("b")) is not None
    clock.now += 31
    assert cache.get(key("large")) is None
    assert cache.nbytes <= 25


def test_an_answer_waits_for_the_memory_of_others(clock: Clock) -> None:
    cache = AnswerCache(Limits(max_outgoing_bytes=100))
    cache.put(key("a"), answer(80, until=NOW + 300), wait_until=NOW)
    outcome: list[bool] = []
    waiting = threading.Thread(
        target=lambda: outcome.append(
            cache.put(key("b"), answer(80, until=NOW + 300), wait_until=NOW + 100)
        )
    )
    waiting.start()
    assert cache.nbytes == 80
    cache.finish(key("a"))
    waiting.join(10)
    assert outcome == [True]
    assert cache.nbytes == 80
    assert not cache.put(key("c"), answer(80, until=NOW + 300), wait_until=NOW)


def test_a_small_answer_waits_for_nobody(clock: Clock) -> None:
    cache = AnswerCache(Limits(max_outgoing_bytes=100))
    assert cache.put(key("large"), answer(100, until=NOW + 300), wait_until=NOW)
    assert cache.put(key("small"), answer(10), wait_until=NOW)


def test_a_single_answer_larger_than_the_memory_of_all_is_still_sent(clock: Clock) -> None:
    cache = AnswerCache(Limits(max_outgoing_bytes=100))
    assert cache.put(key("a"), answer(500, until=NOW + 1), wait_until=NOW)


def test_what_has_arrived_is_not_kept_and_not_computed_again(clock: Clock) -> None:
    cache = AnswerCache(Limits(answer_cache_s=60))
    cache.put(key("a"), answer(10), wait_until=NOW)
    cache.finish(key("a"))
    assert cache.nbytes == 0
    assert cache.is_gone(key("a"))
    clock.now += 61
    cache.expire()
    assert not cache.is_gone(key("a"))


def command(size: int) -> Answered:
    made = answer(size)
    made.of_a_command = True
    return made


def test_what_commands_came_to_leaves_for_time_and_not_for_memory(clock: Clock) -> None:
    cache = AnswerCache(Limits(answer_cache_bytes=25, answer_cache_s=60))
    cache.put(key("command"), command(20), wait_until=NOW)
    for name in "abc":
        cache.put(key(name), answer(10), wait_until=NOW)
    # And it takes nothing from the others either.
    assert [n for n in ("command", *"abc") if cache.get(key(n))] == ["command", "b", "c"]
    clock.now += 61
    assert cache.get(key("command")) is None
    assert cache.nbytes == 0


def test_beyond_their_number_the_oldest_command_is_like_any_answer(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_teacher.rpc.answer_cache._MOST_COMMANDS", 2)
    cache = AnswerCache(Limits(answer_cache_bytes=25))
    for name in "123":
        cache.put(key(name), command(10), wait_until=NOW)
    assert all(cache.get(key(n)) for n in "123")  # there was still room
    for name in "abc":
        cache.put(key(name), answer(10), wait_until=NOW)
    assert [n for n in "123abc" if cache.get(key(n))] == ["2", "3", "b", "c"]


def test_only_so_many_of_those_that_have_arrived_are_known(clock: Clock) -> None:
    cache = AnswerCache(Limits())
    for i in range(8193):
        cache.finish(key(str(i)))
    assert not cache.is_gone(key("0"))
    assert cache.is_gone(key("1"))
    assert cache.is_gone(key("8192"))


def test_a_lookup_does_not_become_slow_with_the_number_of_answers() -> None:
    cache = AnswerCache(Limits(answer_cache_bytes=1 << 30))
    for i in range(20_000):
        cache.put(key(str(i)), answer(1), wait_until=0)
    began = time.perf_counter()
    for i in range(1000):
        cache.get(key(str(i)))
    assert time.perf_counter() - began < 1
