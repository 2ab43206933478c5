"""What a watchdog relies on: a worker that hangs is seen, one that is slow or idle is not taken for it."""

from __future__ import annotations

import threading

from edge_teacher.contract import frame
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Empty
from edge_teacher.rpc.memory import MemoryBroker
from edge_teacher.rpc.progress import Progress
from edge_teacher.rpc.serve import Answer, Method, Server, Tensors
from edge_teacher.rpc.transport import Message


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_idle_worker_must_come_round_and_a_busy_one_must_end() -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    progress.waits()
    clock.now = 59
    assert progress.stuck(600) == ""
    clock.now = 61
    assert "has not come round for 61 s" in progress.stuck(600)
    progress.begins("saliency")
    clock.now += 599
    assert progress.stuck(600) == ""
    clock.now += 2
    assert "has been at saliency for 601 s, and 600 s is the limit" in progress.stuck(600)
    progress.waits()
    assert progress.stuck(600) == ""
    progress.waits_for_another()
    clock.now += 10_000
    assert progress.stuck(600) == ""


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
    assert "worker-0 has been at hang" in server.stuck(0)
    assert server.stuck(600) == ""
    go_on.set()
    assert answered.wait(10)
    server.drain()
