"""PahoTransport against what brokers do seldom, and over links that fail in the wrong moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from edge_teacher.contract.errors import Unreachable
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.transport import Message
from tests.edge_teacher.rpc.scripted_broker import PUBLISH, SUBSCRIBE, ScriptedBroker
from tests.edge_teacher.rpc.wire import eventually


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as ends:
        yield ends


def scripted(ends: ExitStack, **how: object) -> ScriptedBroker:
    broker = ScriptedBroker(**how)  # type: ignore[arg-type]
    ends.callback(broker.close)
    return broker


def connected(ends: ExitStack, broker: ScriptedBroker, **how: object) -> PahoTransport:
    transport = PahoTransport(broker.address, "d1", **how)  # type: ignore[arg-type]
    ends.callback(transport._client.loop_stop)
    ends.callback(transport._client.disconnect)
    return transport


def receive_maximum(count: int) -> bytes:
    return b"\x21" + count.to_bytes(2, "big")


@pytest.mark.parametrize(("said", "most"), [(b"", 10), (receive_maximum(4), 3)])
def test_there_is_room_for_so_many_unacknowledged_and_again_after_an_acknowledgement(
    ends: ExitStack, said: bytes, most: int
) -> None:
    broker = scripted(ends, connack=said)
    transport = connected(ends, broker)
    for i in range(most):
        assert transport.room
        transport.publish(Message(topic="x", payload=str(i).encode()))
    assert not transport.room
    broker.acknowledge(broker.wait(PUBLISH, most)[0])
    eventually(lambda: transport.room)


def test_a_subscription_that_dies_with_its_connection_says_so_at_once(ends: ExitStack) -> None:
    broker = scripted(ends, grants=False)
    transport = connected(ends, broker)
    outcome: list[str] = []

    def subscribe() -> None:
        try:
            transport.subscribe("x", lambda message: None)
        except Unreachable as error:
            outcome.append(str(error))

    waiting = threading.Thread(target=subscribe)
    waiting.start()
    broker.wait(SUBSCRIBE, 1)
    broker.hang_up()
    waiting.join(8)  # before the 10 s it would have waited for an answer
    assert len(outcome) == 1
    assert "the connection was lost" in outcome[0]
