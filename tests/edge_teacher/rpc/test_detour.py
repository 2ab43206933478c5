"""A coordinator whose bulk connection alone is down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest

from edge_teacher.contract import frame, topics
from edge_teacher.contract.limits import CHUNK_BYTES, Limits
from edge_teacher.contract.messages import Control
from edge_teacher.rpc.detour import Detour
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.serve import Server
from edge_teacher.rpc.transport import Message
from tests.brokers import Mosquitto
from tests.edge_teacher.rpc.test_paho import Inbox
from tests.edge_teacher.rpc.wire import (
    COORDINATOR,
    DEVICE,
    TICK_S,
    Ask,
    Device,
    Line,
    Said,
    channel_of,
    eventually,
    noise,
)

BIG = 9 * CHUNK_BYTES + 5
DATA = topics.all_data(COORDINATOR)


def credits(published: list[Message]) -> int:
    said = [frame.decode(m.payload, Control)[0] for m in published if channel_of(m) == "ctl"]
    return sum(control.credits for control in said if control.kind == "credit")


@dataclass
class Here:
    control: Line
    bulk: Line
    caller: Caller
    device: Device
    published: list[Message]

    def check(self, count: int = BIG) -> None:
        body = Ask(text="a", bytes_back=count)
        _, tensors = self.caller.call(DEVICE, "echo", body, answer=Said, timeout_s=20)
        assert np.array_equal(tensors["noise"], noise(count))

    def hears_data(self, line: Line) -> bool:
        return any(topic_filter == DATA for topic_filter, _ in line._handlers)


@pytest.fixture
def here() -> Iterator[Here]:
    published: list[Message] = []

    def record(message: Message) -> list[Message]:
        published.append(message)
        return [message]

    broker, device = MemoryBroker(record), Device()
    theirs, control, bulk = broker.connect(), Line(broker), Line(broker)
    server = Server(theirs, DEVICE, device.methods(), limits=Limits())
    server.start()
    # Silence is asked about too late for these tests: what they wait for must come without it.
    caller = Caller(control, COORDINATOR, bulk=bulk, retry_s=60, tick_s=TICK_S)
    yield Here(control, bulk, caller, device, published)
    caller.close()
    server.drain()
    for end in (theirs, control, bulk):
        end.close()


def test_data_comes_on_the_control_connection_until_the_other_is_back(here: Here) -> None:
    here.check()
    assert not here.hears_data(here.control)
    here.bulk.cut()
    here.check(BIG + 1)
    assert here.hears_data(here.control)
    here.bulk.mend()
    eventually(lambda: not here.hears_data(here.control))
    here.check(BIG + 2)
    assert len(here.device.executed) == 3


def test_what_was_on_its_way_goes_on_from_where_it_was(here: Here) -> None:
    took = here.bulk.deliver

    def cut_after_four(message: Message) -> None:
        took(message)
        if message.user.get("status") == "206":
            came.append(message)
        if len(came) == 4:
            here.bulk.cut()

    came: list[Message] = []
    here.bulk.deliver = cut_after_four  # type: ignore[method-assign]
    here.check()
    sent = [m for m in here.published if m.user.get("status") == "206"]
    assert len(here.device.executed) == 1
    assert len(sent) <= 10 + 8  # those that were on their way to a dead connection


def test_a_chunk_that_comes_on_both_connections_counts_once(here: Here) -> None:
    here.control.subscribe(DATA, here.caller._on_response)
    here.check()
    assert credits(here.published) == 10 - 2
    assert len([m for m in here.published if m.user.get("status") == "206"]) == 10


def test_without_either_connection_the_subscription_waits(here: Here) -> None:
    here.control.cut()
    here.bulk.cut()
    future = here.caller.submit(DEVICE, "echo", Ask(bytes_back=BIG), timeout_s=20)
    here.control.mend()
    assert future.result(20)
    assert here.hears_data(here.control)


def test_a_single_connection_needs_no_way_around_itself() -> None:
    class Returning(Line):
        """It comes back between one look and the next."""

        @property
        def connected(self) -> bool:
            self.up = not self.up
            return self.up

    line = Returning(MemoryBroker())
    detour = Detour(line, line, DATA, lambda message: None)
    assert not detour.follow()
    assert line._handlers == []
    line.close()


def test_over_a_broker(mosquitto: Mosquitto) -> None:
    with ExitStack() as ends:

        def connect(name: str) -> PahoTransport:
            transport = PahoTransport(mosquitto.address, name)
            ends.callback(transport.close)
            return transport

        device, control, bulk = (connect(name) for name in (DEVICE, "ada", "ada:bulk"))
        watcher = Inbox(connect("watcher"), DATA)
        server = Server(device, DEVICE, Device().methods(), limits=Limits())
        server.start()
        caller = Caller(control, COORDINATOR, bulk=bulk, retry_s=60, tick_s=0.05)
        ends.callback(server.drain)
        ends.callback(caller.close)
        bulk._client.reconnect_delay_set(1000, 1000)  # it does not come back within this test
        socket = bulk._client.socket()
        assert socket is not None
        socket.shutdown(2)
        eventually(lambda: not bulk.connected)
        _, tensors = caller.call(DEVICE, "echo", Ask(bytes_back=BIG), answer=Said, timeout_s=20)
        assert np.array_equal(tensors["noise"], noise(BIG))
        watcher.wait(10)


def test_an_ended_subscription_hears_nothing_more(mosquitto: Mosquitto) -> None:
    transport = PahoTransport(mosquitto.address, "a")
    gone, kept = Inbox(transport, "x"), Inbox(transport, "y")
    transport.unsubscribe("x")
    for topic in ("x", "y"):
        transport.publish(Message(topic=topic, payload=b"1"))
    kept.wait(1)
    assert gone.messages == []
    transport.close()
