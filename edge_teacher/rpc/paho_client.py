"""paho's client with its three slow places replaced; PahoTransport is what uses it.

paho reads a packet's first bytes one by one, copies what is left of it at every property and every send,
and hands each packet to its thread through a socket pair: of a 512 KiB chunk it makes some 15 copies, and
a small message costs a dozen system calls and two thread switches. Here the socket is read through a
buffer, a packet through memoryviews, a publisher writes to the socket itself when nothing is in its way,
and properties are packed and read by the few lines the contract needs.

This overrides methods paho does not promise to keep, so `setup.py` names the minor versions it is known to
fit, and `tests/edge_teacher/rpc/test_paho_client.py` fails where they are not called any more.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from paho.mqtt.client import Client, MQTTMessageInfo, mqtt_ms_publish, mqtt_ms_queued
from paho.mqtt.enums import MQTTErrorCode

from edge_teacher.rpc.transport import Message

log = logging.getLogger(__name__)

_RECEIVE_BYTES = 64 * 1024
"""Read at once: a larger buffer is taken from the kernel and given back at every call."""

_PUBLISH = 0x30

# MQTT 5.0, section 2.2.2.2: what a PUBLISH may carry, by how long the value is.
_EXPIRY, _RESPONSE_TOPIC, _CORRELATION, _USER = 0x02, 0x08, 0x09, 0x26
_FIXED = {0x01: 1, _EXPIRY: 4, 0x23: 2}
_TEXT = frozenset({0x03, _RESPONSE_TOPIC, _CORRELATION})
_SUBSCRIPTION = 0x0B


class PackedProperties:
    """The properties of one PUBLISH, already as bytes; stands where paho has its `Properties`."""

    def __init__(self, message: Message) -> None:
        parts = []
        if message.expiry_s is not None:
            parts.append(struct.pack("!BI", _EXPIRY, message.expiry_s))
        if message.response_topic:
            parts.append(_text(_RESPONSE_TOPIC, message.response_topic.encode()))
        if message.correlation:
            parts.append(_text(_CORRELATION, message.correlation))
        for key, value in message.user.items():
            # All but one of them are the same in every message.
            parts.append(_user(key, value) if key != "ms" else _user.__wrapped__(key, value))
        body = b"".join(parts)
        self._packed = _length(len(body)) + body

    def pack(self) -> bytes:
        return self._packed


class _Buffered:
    """A socket that is read in large pieces. `pending` is what paho asks a TLS socket before it waits."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._held = b""
        self._at = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def recv(self, count: int) -> bytes:
        if self._at == len(self._held):
            data: bytes = self._connection.recv(_RECEIVE_BYTES)
            if len(data) <= count:
                return data
            self._held, self._at = data, 0
        found = self._held[self._at : self._at + count]
        self._at += len(found)
        if self._at == len(self._held):
            self._held, self._at = b"", 0
        return found

    def pending(self) -> int:
        further = getattr(self._connection, "pending", None)
        return len(self._held) - self._at + (further() if further else 0)


class FastClient(Client):
    """`received` is called on paho's thread with each PUBLISH."""

    def __init__(self, received: Callable[[Message], None], *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._received = received
        self._writing = threading.Lock()
        self.unreadable = 0
        """Messages refused because a text of theirs is not UTF-8."""
        self._held = threading.local()
        self.may_write_directly = False
        """Between CONNACK and the end of a connection without TLS, whose sockets take one thread at a time."""
        self.turned_at = time.monotonic()
        """When the connection's thread was last seen to come round."""

    @property
    def thread_alive(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

    def turned(self) -> None:
        self.turned_at = time.monotonic()

    def show(self, context: ssl.SSLContext) -> None:
        """Certificates for the next connection, whole, as they were proved; paho takes them only once.

        To read files into the context there is would be to read them again: they may have changed by then,
        and half of them stay if the other half fails.
        """
        self._ssl_context = context

    def loop_misc(self) -> MQTTErrorCode:
        """paho's thread calls it at each turn: once a second when nothing happens."""
        self.turned()
        return super().loop_misc()

    def resend_within(self, most: int) -> None:
        """After CONNACK: no more than `most` unacknowledged, whatever waits from before the connection.

        paho sends all of it again at once, and takes no new bound while it is connected; a broker ends
        the connection for more than its Receive Maximum (MQTT 5.0, section 4.9).
        """
        with self._out_message_mutex:
            self._max_inflight_messages = most
            for message in self._out_messages.values():
                if message.state == mqtt_ms_publish:
                    message.state = mqtt_ms_queued
            self._update_inflight()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What this thread publishes with QoS 0 meanwhile is written at the end, at once.

        Each write costs the kernel more than a small message does, and wakes the broker.
        """
        if getattr(self._held, "packets", None) is not None:
            yield  # within another
            return
        packets: list[bytes] = []
        self._held.packets = packets
        try:
            yield
        finally:
            self._held.packets = None
            if packets:
                self._write(b"".join(packets))

    def publish_unacknowledged(self, message: Message) -> None:
        """With QoS 0. Without a connection it is lost, as its kind may be."""
        packet = publish_packet(message)
        held = getattr(self._held, "packets", None)
        if held is None:
            self._write(packet)
        else:
            held.append(packet)

    def _write(self, packets: bytes) -> None:
        if self._sock is not None:
            self._packet_queue(_PUBLISH, packets, 0, 0, MQTTMessageInfo(0))

    def _create_socket(self) -> Any:
        return _Buffered(super()._create_socket())

    def _packet_queue(
        self, command: int, packet: Any, mid: int, qos: int, info: Any = None
    ) -> MQTTErrorCode:
        view = memoryview(packet)  # so that paho's slices of what is left copy nothing
        if threading.current_thread() is self._thread:
            # It writes before it waits again, and need not be woken.
            self._out_packet.append(_out(command, view, mid, qos, info, 0))
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        # Of all packets only these: paho's thread has more to do about a DISCONNECT than to write it.
        direct = self.may_write_directly and command & 0xF0 == _PUBLISH
        if direct and self._writing.acquire(blocking=False):
            try:
                connection, waiting = self._sock, self._out_packet
                if not waiting and (sent := self._send_now(connection, view)):
                    if sent < len(view):  # the rest comes before anything else
                        waiting.appendleft(_out(command, view, mid, qos, info, sent))
                        self._wake()
                    elif info is not None and qos == 0:
                        info._set_as_published()
                    return MQTTErrorCode.MQTT_ERR_SUCCESS
            finally:
                self._writing.release()
        return super()._packet_queue(command, view, mid, qos, info)  # type: ignore[arg-type]

    def _send_connect(self, keepalive: int) -> MQTTErrorCode:
        """A connection begins with CONNECT, and not with the rest of a packet of the one before."""
        with self._writing:
            self._out_packet.clear()
        return super()._send_connect(keepalive)

    def _packet_write(self) -> MQTTErrorCode:
        with self._writing:
            return super()._packet_write()

    def _send_now(self, connection: Any, view: memoryview) -> int:
        """Bytes the socket took at once. An error is left to paho's thread, which meets it too."""
        if connection is None:
            return 0
        try:
            sent: int = connection.send(view)
        except OSError:
            return 0
        with self._msgtime_mutex:
            self._last_msg_out = time.monotonic()
        return sent

    def _wake(self) -> None:
        if self._sockpairW is not None:
            with contextlib.suppress(BlockingIOError):
                self._sockpairW.send(b"0")

    def _handle_publish(self) -> MQTTErrorCode:
        first = self._in_packet["command"]
        try:
            message, identifier = read_publish(first, memoryview(self._in_packet["packet"]))
        except NotUtf8 as error:
            # Acknowledged, or the broker would keep it, and a place of the Receive Maximum, for ever.
            self.unreadable += 1
            log.warning("refused a message, the %d. of its kind: %s", self.unreadable, error)
            return self._acknowledge(error.identifier)
        except (ValueError, struct.error, IndexError):
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        with self._in_callback_mutex:
            self._received(message)
        return self._acknowledge(identifier)

    def _acknowledge(self, identifier: int) -> MQTTErrorCode:
        return self._send_puback(identifier) if identifier else MQTTErrorCode.MQTT_ERR_SUCCESS


def publish_packet(message: Message) -> bytes:
    """A PUBLISH with QoS 0 (MQTT 5.0, section 3.3)."""
    topic = _text(None, message.topic.encode())
    properties = PackedProperties(message).pack()
    size = len(topic) + len(properties) + len(message.payload)
    first = bytes([_PUBLISH | message.retain])
    return b"".join((first, _length(size), topic, properties, message.payload))


class NotUtf8(ValueError):
    """A text of a PUBLISH is not UTF-8: the message is refused, and the connection is whole."""

    def __init__(self, identifier: int, error: UnicodeDecodeError) -> None:
        super().__init__(f"one of its texts is not UTF-8: {error}")
        self.identifier = identifier


def read_publish(first: int, packet: memoryview) -> tuple[Message, int]:
    """A PUBLISH without its fixed header -> (message, packet identifier).

    Raises NotUtf8 for one with such a text, and ValueError, struct.error or IndexError for what is none;
    also for QoS 2, which this client never subscribes with.
    """
    qos = first >> 1 & 3
    if qos > 1:
        raise ValueError("QoS 2")
    topic, at = _take_text(packet, 0)
    identifier = 0
    if qos:
        (identifier,) = struct.unpack_from("!H", packet, at)
        at += 2
    length, at = _take_length(packet, at)
    end = at + length
    if end > len(packet):
        raise ValueError("the properties are longer than the packet")
    expiry: int | None = None
    texts: dict[int, bytes] = {}
    user: list[tuple[memoryview, memoryview]] = []
    while at < end:
        kind = packet[at]
        at += 1
        if kind == _USER:
            key, at = _take_text(packet, at)
            value, at = _take_text(packet, at)
            user.append((key, value))
        elif kind in _TEXT:
            text, at = _take_text(packet, at)
            texts[kind] = bytes(text)
        elif kind == _SUBSCRIPTION:
            _, at = _take_length(packet, at)
        else:
            size = _FIXED.get(kind)
            if size is None:
                raise ValueError(f"unknown property {kind}")
            if kind == _EXPIRY:
                (expiry,) = struct.unpack_from("!I", packet, at)
            at += size
    if at != end:
        raise ValueError("a property is longer than all of them")
    try:
        message = Message(
            topic=str(topic, "utf-8"),
            # What is large stays where it was received; a small one does not hold on to its packet.
            payload=packet[end:] if len(packet) - end > _RECEIVE_BYTES else bytes(packet[end:]),
            qos=qos,
            retain=bool(first & 1),
            response_topic=texts.get(_RESPONSE_TOPIC, b"").decode(),
            correlation=texts.get(_CORRELATION, b""),
            expiry_s=expiry,
            user={str(key, "utf-8"): str(value, "utf-8") for key, value in user},
        )
    except UnicodeDecodeError as error:
        raise NotUtf8(identifier, error) from error
    return message, identifier


def _out(command: int, view: memoryview, mid: int, qos: int, info: Any, pos: int) -> Any:
    return {
        "command": command,
        "mid": mid,
        "qos": qos,
        "pos": pos,
        "to_process": len(view) - pos,
        "packet": view,
        "info": info,
    }


def _text(kind: int | None, value: bytes) -> bytes:
    head = b"" if kind is None else bytes([kind])
    return head + struct.pack("!H", len(value)) + value


@functools.lru_cache(maxsize=256)
def _user(key: str, value: str) -> bytes:
    return _text(_USER, key.encode()) + _text(None, value.encode())


def _length(value: int) -> bytes:
    """A variable byte integer (section 1.5.5)."""
    found = bytearray()
    while True:
        value, low = divmod(value, 128)
        found.append(low | (0x80 if value else 0))
        if not value:
            return bytes(found)


def _take_length(packet: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in (0, 7, 14, 21):
        byte = packet[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a length of more than four bytes")


def _take_text(packet: memoryview, at: int) -> tuple[memoryview, int]:
    (size,) = struct.unpack_from("!H", packet, at)
    end = at + 2 + size
    if end > len(packet):
        raise ValueError("a text is longer than the packet")
    return packet[at + 2 : end], end
