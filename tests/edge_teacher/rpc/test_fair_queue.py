from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from edge_teacher.rpc.fair_queue import FairQueue, Job, Key
from edge_teacher.rpc.transport import Message


def job(asker: str, number: int = 0, deadline: float | None = None) -> Job:
    key = Key(f"fedsa/v1/{asker}/rsp/d1", bytes([number]))
    return Job(key, asker, "saliency", Message(topic="", payload=b""), deadline, 0.0)


def queue_of(*jobs: Job) -> FairQueue:
    queue = FairQueue(1000, 1000)
    for each in jobs:
        assert queue.put(each) == ""
    return queue


def test_coordinators_take_turns() -> None:
    queue = queue_of(job("a", 1), job("a", 2), job("a", 3), job("b", 1), job("c", 1))
    taken = [queue.take(0) for _ in range(5)]
    assert [(each.asker, each.key.correlation[0]) for each in taken if each] == [
        ("a", 1), ("b", 1), ("c", 1), ("a", 2), ("a", 3)
    ]  # fmt: skip


def test_who_has_something_under_way_can_be_left_out() -> None:
    queue = queue_of(job("a", 1), job("a", 2), job("b", 1))
    taken = queue.take(0, without={"a"})
    assert taken is not None
    assert taken.asker == "b"
    assert queue.take(5, without={"a"}) is None  # and it does not wait for another
    assert len(queue) == 2


def test_some_are_taken_out_of_their_turn() -> None:
    wanted = [job("a", 2), job("b", 2)]
    queue = queue_of(job("a", 1), wanted[0], wanted[1], job("b", 3))
    assert queue.take_all(lambda each: each.key.correlation == b"\x02") == wanted
    assert len(queue) == 2


def test_take_waits_for_one_to_come() -> None:
    queue = queue_of()
    found: list[Job | None] = []
    taking = threading.Thread(target=lambda: found.append(queue.take(20)))
    taking.start()
    queue.put(job("a"))
    taking.join(20)
    assert [each.asker for each in found if each] == ["a"]


@given(st.lists(st.sampled_from("abc"), max_size=30), st.sets(st.sampled_from("abc")))
def test_nobody_is_lost_and_nobody_is_twice(askers: list[str], without: set[str]) -> None:
    jobs = [job(asker, i) for i, asker in enumerate(askers)]
    queue = queue_of(*jobs)
    first = []
    while (each := queue.take(0, without)) is not None:
        first.append(each)
    assert {each.asker for each in first}.isdisjoint(without)
    rest = queue.take_all(lambda _job: True)
    assert sorted(each.key.correlation for each in first + rest) == [
        bytes([i]) for i in range(len(jobs))
    ]
    assert len(queue) == 0
