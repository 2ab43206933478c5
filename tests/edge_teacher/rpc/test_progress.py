"""What a watchdog relies on: a worker that hangs is seen, one that is slow or idle is not taken for it."""

from __future__ import annotations

import threading

import pytest

from edge_teacher.contract import frame
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Empty
from edge_teacher.rpc.fair_queue import Job, Key
from edge_teacher.rpc.line import Joint, Line
from edge_teacher.rpc.memory import MemoryBroker
from edge_teacher.rpc.progress import Progress
from edge_teacher.rpc.serve import Answer, Method, Server, Tensors
from edge_teacher.rpc.transport import Message
from tests.edge_teacher.rpc.wire import eventually


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def job(number: int, *, begun: bool = False) -> Job:
    key = Key("fedsa/v1/ada/rsp/d1", bytes([number]))
    message = Message(topic="fedsa/v1/d1/req/saliency", payload=b"")
    return Job(key, "ada", "saliency", message, None, 0.0, begun=begun)


def test_one_that_is_computed_for_too_long_is_hung_however_many_others_end() -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    hung = job(0, begun=True)
    for second in range(0, 600, 5):
        clock.now = second
        assert progress.look([hung, job(1 + second // 5 % 200, begun=True), job(250)], 600) == ""
    clock.now = 606
    said = progress.look([hung], 600)
    assert said == "saliency has been computed for 606 s, and 600 s is the limit"
    assert progress.look([], 600) == ""
    # The same request again, long after: it is counted anew.
    assert progress.look([hung], 600) == ""


def test_one_whose_steps_come_out_is_not_hung_however_long_it_takes() -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    large = job(0, begun=True)
    for second in range(0, 6000, 500):
        clock.now = second
        assert progress.look([large], 600) == ""
        large.steps += 1
    assert progress.look([large], 600) == ""  # the last one is seen
    clock.now += 601
    said = progress.look([large], 600)
    assert said == "saliency has had no step for 601 s, and 600 s is the limit"


def test_requests_that_nobody_takes() -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    waiting = [job(1), job(2)]
    assert progress.look(waiting, 600) == ""
    clock.now = 59
    assert progress.look(waiting, 600) == ""
    clock.now = 61
    assert progress.look(waiting, 600) == "2 requests wait, and none has been begun for 61 s"
    # While one is computed the others may wait as long as they like, and idle is no fault.
    assert progress.look([*waiting, job(3, begun=True)], 600) == ""
    clock.now = 100
    assert progress.look(waiting, 600) == ""
    clock.now = 10_000
    assert progress.look([], 600) == ""


def test_a_server_whose_worker_hangs_says_so_until_it_goes_on() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hang(_request: Empty, _tensors: Tensors) -> Answer:
        begun.set()
        go_on.wait(30)
        return Empty(), {}

    broker = MemoryBroker()
    server = Server(broker.connect(), "d1", {"hang": Method(Empty, hang)}, limits=Limits())
    server.start()
    assert server.stuck(600) == ""
    answered = threading.Event()
    asker = broker.connect()
    asker.subscribe("fedsa/v1/ada/rsp/d1", lambda _m: answered.set())
    topic, back = "fedsa/v1/d1/req/hang", "fedsa/v1/ada/rsp/d1"
    payload = frame.encode(Empty())
    asker.publish(Message(topic=topic, payload=payload, response_topic=back, correlation=b"1"))
    assert begun.wait(10)
    assert server.stuck(0) == ""  # seen for the first time
    assert "hang has been computed for 0 s, and 0 s is the limit" in server.stuck(0)
    assert server.stuck(600) == ""
    go_on.set()
    assert answered.wait(10)
    assert server.stuck(0) == ""
    server.drain()


def test_an_engine_that_takes_nothing_is_seen_while_uploads_are_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_teacher.rpc.progress._TAKEN_WITHIN_S", 0.0)
    begun, go_on = threading.Event(), threading.Event()

    def upload(_request: Empty, _tensors: Tensors) -> Answer:
        begun.set()
        go_on.wait(30)
        return Empty(), {}

    class Hanging:
        threads = 1

        def serve(self, line: Line) -> None:
            go_on.wait(30)

    broker = MemoryBroker()
    methods = {"upload": Method(Empty, upload), "ask": Joint(Empty, about=lambda _: None)}
    server = Server(broker.connect(), "d1", methods, limits=Limits(), engine=Hanging())
    server.start()
    asker = broker.connect()
    for method in methods:
        asker.publish(
            Message(
                topic=f"fedsa/v1/d1/req/{method}",
                payload=frame.encode(Empty()),
                response_topic="fedsa/v1/ada/rsp/d1",
                correlation=method.encode(),
            )
        )
    assert begun.wait(10)
    eventually(lambda: server.queued == 1)
    assert server.stuck(600) == ""  # seen for the first time
    assert server.stuck(600) == "1 requests wait, and none has been begun for 0 s"
    go_on.set()
    server.drain()
