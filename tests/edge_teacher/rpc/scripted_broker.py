"""A broker played by hand, for what a real one does seldom: it grants, and acknowledges only when told to."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.paho_client import read_publish
from edge_teacher.rpc.transport import Message

WAIT_S = 15
CONNECT, PUBLISH, PUBACK, SUBSCRIBE, UNSUBSCRIBE, PINGREQ = 1, 3, 4, 8, 10, 12


def packet(first: int, body: bytes) -> bytes:
    assert len(body) < 128
    return bytes([first, len(body)]) + body


def user_property(key: bytes, value: bytes) -> bytes:
    return b"\x26" + struct.pack("!H", len(key)) + key + struct.pack("!H", len(value)) + value


def publish(topic: str, payload: bytes, properties: bytes, *, identifier: int = 0) -> bytes:
    """QoS 1 with an identifier, else QoS 0."""
    head = struct.pack("!H", len(topic)) + topic.encode()
    number = struct.pack("!H", identifier) if identifier else b""
    body = head + number + bytes([len(properties)]) + properties + payload
    return packet(0x32 if identifier else 0x30, body)


@dataclass
class Heard:
    connection: int
    """The how-manieth, from 0."""
    kind: int
    body: bytes
    first: int

    @property
    def message(self) -> Message:
        return read_publish(self.first, memoryview(self.body))[0]

    @property
    def identifier(self) -> int:
        if self.kind == PUBLISH:
            return read_publish(self.first, memoryview(self.body))[1]
        return int.from_bytes(self.body[:2], "big")


class ScriptedBroker:
    """`connack`: the properties of each CONNACK. `grants`: whether a SUBSCRIBE is answered."""

    def __init__(self, *, connack: bytes = b"", grants: bool = True) -> None:
        self.connack = connack
        self.grants = grants
        self.heard: list[Heard] = []
        self._open: list[socket.socket] = []
        self._changed = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = BrokerAddress(host="127.0.0.1", port=self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def of(self, kind: int) -> list[Heard]:
        with self._changed:
            return [heard for heard in self.heard if heard.kind == kind]

    def wait(self, kind: int, count: int) -> list[Heard]:
        with self._changed:
            found = self._changed.wait_for(lambda: len(self.of(kind)) >= count, WAIT_S)
        assert found, f"{len(self.of(kind))} of {count} packets of the kind {kind} came"
        return self.of(kind)

    def send(self, raw: bytes) -> None:
        """On the newest connection."""
        self._open[-1].sendall(raw)

    def acknowledge(self, heard: Heard) -> None:
        self.send(packet(0x40, struct.pack("!H", heard.identifier)))

    def hang_up(self) -> None:
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.hang_up()
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                number = len(self._open) - 1
                threading.Thread(target=self._read, args=(connection, number), daemon=True).start()

    def _read(self, connection: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._answer(connection, self._next(connection, number))

    def _next(self, connection: socket.socket, number: int) -> Heard:
        def take(count: int) -> bytes:
            taken = b""
            while len(taken) < count:
                more = connection.recv(count - len(taken))
                if not more:
                    raise EOFError
                taken += more
            return taken

        first, size, shift = take(1)[0], 0, 0
        while (byte := take(1)[0]) >= 128:
            size, shift = size | (byte & 127) << shift, shift + 7
        return Heard(number, first >> 4, take(size | byte << shift), first)

    def _answer(self, connection: socket.socket, heard: Heard) -> None:
        answers: dict[int, Callable[[], bytes]] = {
            CONNECT: lambda: packet(0x20, bytes([0, 0, len(self.connack)]) + self.connack),
            SUBSCRIBE: lambda: packet(0x90, heard.body[:2] + b"\0\1") if self.grants else b"",
            UNSUBSCRIBE: lambda: packet(0xB0, heard.body[:2] + b"\0\0"),
            PINGREQ: lambda: packet(0xD0, b""),
        }
        # Sent before it is noted: who waits for it knows that its answer is on its way.
        connection.sendall(answers.get(heard.kind, lambda: b"")())
        with self._changed:
            self.heard.append(heard)
            self._changed.notify_all()
