"""PahoTransport against what brokers do seldom, and over links that fail in the wrong moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from edge_teacher.contract.errors import Unreachable
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.takeover import Takeovers
from edge_teacher.rpc.transport import Message
from tests.edge_teacher.rpc.scripted_broker import (
    CONNECT,
    PUBACK,
    PUBLISH,
    SUBSCRIBE,
    ScriptedBroker,
    packet,
    publish,
    user_property,
)
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


def test_no_more_is_sent_than_the_broker_takes_also_after_a_reconnection(ends: ExitStack) -> None:
    """paho sends again all at once, and a broker ends the connection for more than it said."""
    broker = scripted(ends, connack=receive_maximum(3))
    transport = connected(ends, broker)
    said = [str(i).encode() for i in range(9)]
    for payload in said:
        transport.publish(Message(topic="x", payload=payload))

    def sent(connection: int) -> list[bytes]:
        here = [heard for heard in broker.of(PUBLISH) if heard.connection == connection]
        return [bytes(heard.message.payload) for heard in here]

    def fence() -> None:
        """Everything written before this has been read by the broker."""
        count = len(broker.of(SUBSCRIBE))
        transport.subscribe("fence", lambda message: None)
        broker.wait(SUBSCRIBE, count + 1)

    fence()
    assert sent(0) == said[:3]
    broker.acknowledge(broker.of(PUBLISH)[0])
    broker.wait(PUBLISH, 4)
    broker.hang_up()
    eventually(lambda: len(sent(1)) >= 3)
    fence()
    assert sent(1) == said[1:4]
    kinds = [heard.kind for heard in broker.heard if heard.connection == 1]
    assert kinds.index(SUBSCRIBE) < kinds.index(PUBLISH)
    for i in range(8):
        eventually(lambda n=i: len(sent(1)) > n)  # type: ignore[misc]
        broker.acknowledge([h for h in broker.of(PUBLISH) if h.connection == 1][i])
    assert sent(1) == said[1:]


def test_a_broker_that_takes_more_is_not_sent_more_than_before(ends: ExitStack) -> None:
    broker = scripted(ends)
    transport = connected(ends, broker)
    for i in range(25):
        transport.publish(Message(topic="x", payload=str(i).encode()))
    transport.subscribe("fence", lambda message: None)
    assert len(broker.of(PUBLISH)) == 20


def test_a_session_taken_over_is_said_once_by_its_name_and_not_fought_for(
    ends: ExitStack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_teacher.rpc.takeover._FIRST_S", 0.1)
    broker = scripted(ends)
    transport = connected(ends, broker)
    for count in range(1, 4):
        broker.wait(CONNECT, count)
        eventually(lambda: transport.connected)
        caplog.clear()
        broker.send(packet(0xE0, b"\x8e\0"))
        began = time.monotonic()
        broker.wait(CONNECT, count + 1)
        assert time.monotonic() - began >= 0.75 * 0.1 * 2 ** (count - 1)
        (said,) = [record.getMessage() for record in caplog.records]
        assert "another client has connected" in said
        assert "'d1'" in said


class TestTakeovers:
    def test_each_in_a_row_waits_longer_up_to_a_minute_and_off_the_beat(self) -> None:
        takeovers = Takeovers()
        waits = [takeovers.told(5) for _ in range(20)]
        for i, wait in enumerate(waits):
            assert 0.75 * min(60, 2**i) <= wait <= 1.25 * min(60, 2**i)
        assert len(set(waits[6:])) > 10

    def test_after_a_long_session_it_begins_anew(self) -> None:
        takeovers = Takeovers()
        for _ in range(5):
            takeovers.told(5)
        assert takeovers.told(1000) <= 1.25

    def test_brief_sessions_without_a_reason_are_suspicious_after_a_while(self) -> None:
        takeovers = Takeovers()
        assert [takeovers.suspected(0.3) for _ in range(4)] == [None] * 4
        waits = [takeovers.suspected(2.4) for _ in range(20)]  # as long as the other stays away
        assert all(wait is not None and 1.5 <= wait <= 2.5 for wait in waits)
        assert takeovers.suspected(10) is None
        assert takeovers.suspected(0.3) is None


NOT_UTF8 = b"\xff\xfe"


@pytest.mark.parametrize(
    "properties",
    [
        user_property(b"src", NOT_UTF8),
        user_property(NOT_UTF8, b"1"),
        b"\x08\0\2" + NOT_UTF8,
    ],
    ids=["value", "key", "response topic"],
)
@pytest.mark.parametrize("identifier", [0, 7])
def test_a_text_that_is_not_utf8_costs_its_message_and_not_the_connection(
    ends: ExitStack, caplog: pytest.LogCaptureFixture, properties: bytes, identifier: int
) -> None:
    broker = scripted(ends)
    transport = connected(ends, broker)
    heard: list[Message] = []
    transport.subscribe("x", heard.append)
    broker.send(publish("x", b"bad", properties, identifier=identifier))
    broker.send(publish("x", b"good", user_property(b"k", b"v"), identifier=8))
    eventually(lambda: bool(heard))
    assert [(bytes(m.payload), m.user) for m in heard] == [(b"good", {"k": "v"})]
    assert transport.unreadable == 1
    assert [h.identifier for h in broker.wait(PUBACK, 2 if identifier else 1)] == (
        [7, 8] if identifier else [8]
    )
    assert len(broker.of(CONNECT)) == 1
    assert "not UTF-8" in caplog.text


def test_an_acknowledgement_that_cannot_be_read_does_not_end_the_thread(ends: ExitStack) -> None:
    broker = scripted(ends)
    transport = connected(ends, broker)
    transport.publish(Message(topic="x", payload=b"1"))
    (sent,) = broker.wait(PUBLISH, 1)
    reason_string = b"\x1f\0\2" + NOT_UTF8
    body = sent.identifier.to_bytes(2, "big") + b"\0" + bytes([len(reason_string)]) + reason_string
    broker.send(packet(0x40, body))
    broker.wait(CONNECT, 2)
    eventually(lambda: transport.connected)
