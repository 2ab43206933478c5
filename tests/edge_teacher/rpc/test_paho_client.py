"""What replaces paho's slow places is in use, and says on the wire what the standard wants."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_teacher.contract.errors import TooLarge
from edge_teacher.contract.limits import MAX_PACKET_BYTES
from edge_teacher.rpc import paho_client
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.paho_client import FastClient, PackedProperties, read_publish
from edge_teacher.rpc.transport import Message
from tests.brokers import Mosquitto
from tests.edge_teacher.rpc.test_paho import Inbox

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
messages = st.builds(
    Message,
    topic=texts.filter(bool),
    payload=st.binary(max_size=200),
    qos=st.sampled_from([0, 1]),
    retain=st.booleans(),
    response_topic=texts,
    correlation=st.binary(max_size=70),
    expiry_s=st.none() | st.integers(0, (1 << 32) - 1),
    user=st.dictionaries(texts, texts, max_size=4),
)


def publish_packet(message: Message, properties: bytes) -> tuple[int, bytes]:
    """(first byte, what follows the length), by section 3.3 of the standard."""
    topic = message.topic.encode()
    head = struct.pack("!H", len(topic)) + topic + (struct.pack("!H", 7) if message.qos else b"")
    return 0x30 | message.qos << 1 | message.retain, head + properties + bytes(message.payload)


@given(messages)
def test_what_is_packed_is_read_back(message: Message) -> None:
    first, packet = publish_packet(message, PackedProperties(message).pack())
    found, identifier = read_publish(first, memoryview(packet))
    assert found == message
    assert identifier == (7 if message.qos else 0)


@given(messages)
def test_paho_reads_what_is_packed_and_the_other_way_round(message: Message) -> None:
    theirs = Properties(PacketTypes.PUBLISH)
    theirs.unpack(PackedProperties(message).pack())
    assert getattr(theirs, "ResponseTopic", "") == message.response_topic
    assert getattr(theirs, "CorrelationData", b"") == message.correlation
    assert getattr(theirs, "MessageExpiryInterval", None) == message.expiry_s
    assert dict(getattr(theirs, "UserProperty", [])) == message.user
    theirs.PayloadFormatIndicator = 1
    theirs.TopicAlias = 3
    theirs.ContentType = "x"
    first, packet = publish_packet(message, theirs.pack())
    assert read_publish(first, memoryview(packet))[0] == message


@given(messages, st.integers(0, 80))
def test_every_truncation_before_the_payload_is_refused(message: Message, end: int) -> None:
    first, packet = publish_packet(message, PackedProperties(message).pack())
    head = len(packet) - len(message.payload)
    with pytest.raises((ValueError, IndexError, struct.error)):
        read_publish(first, memoryview(packet[: min(end, head - 1)]))


def test_paho_calls_what_replaces_it(mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch) -> None:
    called: set[str] = set()

    for name in (
        "_packet_queue",
        "_packet_write",
        "_handle_publish",
        "_create_socket",
        "_send_now",
    ):
        original = getattr(FastClient, name)

        def noting(
            self: FastClient, *a: object, _n: str = name, _o=original, **k: object
        ) -> object:  # type: ignore[no-untyped-def]
            called.add(_n)
            return _o(self, *a, **k)

        monkeypatch.setattr(FastClient, name, noting)
    reads: list[int] = []
    receive = paho_client._Buffered.recv
    monkeypatch.setattr(
        paho_client._Buffered, "recv", lambda self, n: reads.append(n) or receive(self, n)
    )
    transport = PahoTransport(mosquitto.address, "a")
    inbox = Inbox(transport, "x")
    transport.publish(Message(topic="x", payload=b"1"))
    inbox.wait(1)
    transport.close()
    assert called == {
        "_packet_queue",
        "_packet_write",
        "_handle_publish",
        "_create_socket",
        "_send_now",
    }
    assert reads


def test_many_threads_publish_whole_packets(mosquitto: Mosquitto) -> None:
    """They write to one socket: what one began must be finished before another begins."""
    sender, receiver = (PahoTransport(mosquitto.address, name) for name in ("a", "b"))
    inbox = Inbox(receiver, "x/+")

    def publish(number: int) -> None:
        for i in range(40):
            payload = bytes([number]) * (1 if i % 2 else 300_000)
            sender.publish(Message(topic=f"x/{number}", payload=payload, qos=i % 2))

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for message in inbox.wait(160):
        assert set(bytes(message.payload)) == {int(message.topic[2:])}
        assert len(message.payload) in (1, 300_000)
    sender.close()
    receiver.close()


class Slow:
    """A socket that takes a few bytes at a time, and during whose first send something else happens."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.taken = b""
        self._meanwhile = meanwhile

    def send(self, data: memoryview) -> int:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        meanwhile()
        self.taken += bytes(data[:5])
        return min(len(data), 5)


def test_a_packet_that_was_begun_is_finished_before_one_that_came_meanwhile() -> None:
    """paho's own thread queues acknowledgements and pings without asking whoever writes."""
    client = FastClient(lambda message: None, CallbackAPIVersion.VERSION2)
    begun, meanwhile = bytes([0x32]) + b"begun in one thread", b"\x40\x02\0\7"
    slow = Slow(
        lambda: client._out_packet.append(
            paho_client._out(0x40, memoryview(meanwhile), 7, 0, None, 0)
        )
    )
    client._sock = slow  # type: ignore[assignment]
    client.may_write_directly = True
    client._packet_queue(0x32, begun, 1, 1)
    while client._out_packet:
        client._packet_write()
    assert slow.taken == begun + meanwhile
    client._sock = None


def test_the_rest_of_a_packet_does_not_wait_until_pahos_thread_wakes_by_itself(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastClient, "_loop", lambda self, timeout=1.0: Client._loop(self, 600))
    sender, receiver = (PahoTransport(mosquitto.address, name) for name in ("a", "b"))
    inbox = Inbox(receiver, "x")
    connection = sender._client.socket()
    assert connection is not None
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    payload = bytes(MAX_PACKET_BYTES - 4096)
    sender.publish(Message(topic="x", payload=payload, qos=0))
    assert inbox.wait(1)[0].payload == payload
    sender.close()
    receiver.close()


@given(messages)
def test_a_message_without_acknowledgement_is_packed_whole(message: Message) -> None:
    packet = paho_client.publish_packet(message)
    length, at = paho_client._take_length(memoryview(packet), 1)
    assert at + length == len(packet)
    found, _ = read_publish(packet[0], memoryview(packet)[at:])
    assert found == replace(message, qos=0)


def test_what_is_published_together_is_one_write_and_arrives_in_order(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (PahoTransport(mosquitto.address, name) for name in ("a", "b"))
    try:
        inbox = Inbox(b, "x/+")
        written: list[int] = []
        send = FastClient._send_now
        monkeypatch.setattr(
            FastClient, "_send_now", lambda s, c, v: written.append(len(v)) or send(s, c, v)
        )
        with a.together():
            for i in range(5):
                a.publish(Message(topic=f"x/{i}", payload=bytes([i]), qos=0))
            assert written == []
            with a.together():  # within another it adds to that
                a.publish(Message(topic="x/5", payload=b"", qos=0))
        assert len(written) == 1
        a.publish(Message(topic="x/6", payload=b"", qos=0))
        assert [m.topic for m in inbox.wait(7)] == [f"x/{i}" for i in range(7)]
    finally:
        a.close()
        b.close()


def test_more_together_than_the_socket_takes_at_once_arrives_whole(mosquitto: Mosquitto) -> None:
    a, b = (PahoTransport(mosquitto.address, name) for name in ("a", "b"))
    try:
        inbox = Inbox(b, "x")
        with a.together():
            for i in range(400):
                a.publish(Message(topic="x", payload=bytes([i % 251]) * 60_000, qos=0))
        a.publish(Message(topic="x", payload=b"last", qos=1))
        payloads = [bytes(m.payload) for m in inbox.wait(401)]
        assert payloads[:400] == [bytes([i % 251]) * 60_000 for i in range(400)]
        assert payloads[400] == b"last"
    finally:
        a.close()
        b.close()


def test_an_error_meanwhile_still_sends_what_was_published(mosquitto: Mosquitto) -> None:
    a, b = (PahoTransport(mosquitto.address, name) for name in ("a", "b"))
    try:
        inbox = Inbox(b, "x")
        with contextlib.suppress(TooLarge), a.together():
            for payload in (b"1", bytes(MAX_PACKET_BYTES), b"2"):
                a.publish(Message(topic="x", payload=payload, qos=0))
        a.publish(Message(topic="x", payload=b"3", qos=0))
        assert [m.payload for m in inbox.wait(2)] == [b"1", b"3"]
    finally:
        a.close()
        b.close()
