"""Hostile messages for both ends: damaged, lying, oversized, out of place; and whether the ends survived."""

from __future__ import annotations

import logging
import random
import struct
import threading
from concurrent.futures import Future
from dataclasses import replace

import msgspec
import numpy as np

from edge_teacher.contract import frame, topics
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Chunk, Control, Problem
from edge_teacher.rpc import chunks
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker
from edge_teacher.rpc.serve import Server
from edge_teacher.rpc.transport import Message, matches
from tests.edge_teacher.rpc.wire import COORDINATOR, DEVICE, Ask, Device, Said

_SIZES = (-(1 << 63), -1, 0, 1, 255, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1)
_VERSIONS = ("", "1.0", "1.1", "1.99", "2.0", "0.9", "1", "x" * 1000, "1.1\0", "-1.-1", "1.99999")


class Hostile:
    """Makes messages from a source of chance."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        ask = frame.encode(Ask(text="x"), {"a": np.arange(8, dtype=np.float32)})
        whole = frame.encode_parts(
            Said(text="big", times=1), {"noise": np.zeros(2 << 20, np.uint8)}
        )
        self._whole_sha = whole.sha256()
        self._seeds = [
            ask,
            frame.encode(Said(text="", times=1)),
            frame.encode(Problem(code=429, message="m", retry_after_s=1.0)),
            chunks.cut(whole, 0, 1000, self._whole_sha),
            frame.encode(Control(kind="resend", correlation=b"c", ranges=((0, 1),))),
            b"",
        ]

    def payload(self) -> bytes:
        kind = self._chance.randrange(5)
        if kind == 0:
            return self._chance.randbytes(self._chance.randrange(200))
        if kind == 1:  # a header that lies
            body = self._chance.choice(
                [{}, [], None, {"text": 5}, {"code": 1 << 60}, {"x": "y" * 500}]
            )
            shape = [self._size() for _ in range(self._chance.randrange(8))]
            name, dtype = self._chance.choice("ab"), self._chance.choice(("u8", "f16", "f32", "no"))
            spec = {"name": name, "dtype": dtype, "shape": shape, "packed": self._small()}
            header = msgspec.msgpack.encode(
                {"body": body, "tensors": [spec] * self._chance.randrange(3)}
            )
            return b"FSA1" + struct.pack("<I", len(header)) + header + bytes(64)
        if kind == 2:
            return self.chunk()
        seed = bytearray(self._chance.choice(self._seeds))
        for _ in range(self._chance.randrange(4)):
            if seed:
                seed[self._chance.randrange(len(seed))] = self._chance.randrange(256)
        return bytes(seed[: self._chance.randrange(len(seed) + 1)] if kind == 3 else seed)

    def chunk(self) -> bytes:
        chunk = Chunk(
            offset=self._size(),
            total_bytes=self._size(),
            crc32=self._chance.choice((0, 1 << 40, -5)),
            sha256=self._chance.choice(("", "x", self._whole_sha)),
        )
        return frame.encode(chunk, {"data": np.zeros(self._chance.randrange(100), np.uint8)})

    def control(self, correlation: bytes) -> bytes:
        if self._chance.random() < 0.3:
            return self.payload()
        ranges = tuple((self._size(), self._size()) for _ in range(self._chance.randrange(40)))
        control = Control(
            kind=self._chance.choice(("resend", "credit", "done", "cancel")),  # type: ignore[arg-type]
            correlation=self._chance.choice((correlation, b"", b"?" * 64)),
            respond_to=self._chance.choice(
                (topics.response("mallory", DEVICE), "", "#", "x" * 500)
            ),
            ranges=ranges,
            credits=self._size(),
        )
        return frame.encode(control)

    def to_server(self) -> Message:
        correlation = self._chance.randbytes(self._chance.choice((0, 1, 16, 64, 65, 1000)))
        if self._chance.random() < 0.4:
            return Message(topic=topics.control(DEVICE), payload=self.control(correlation))
        channel = self._chance.choice(("req", "put"))
        method = self._chance.choice(("echo", "fail", "nothing", "a.b", "", "../x", "é"))
        topic = f"fedsa/v1/{DEVICE}/{channel}/{method}"
        answer_to = (topics.response("mallory", DEVICE), "", "fedsa/v1/d2/state", "#", "x" * 9999)
        return Message(
            topic=topic,
            payload=self.payload(),
            response_topic=self._chance.choice(answer_to),
            correlation=correlation,
            expiry_s=self._chance.choice((None, 0, 1, 1 << 31)),
            user={"v": self._chance.choice(_VERSIONS), "accept": self._chance.choice(("", "zstd"))},
        )

    def to_client(self, correlation: bytes) -> Message:
        topic = self._chance.choice((topics.response, topics.data))(COORDINATOR, DEVICE)
        status = self._chance.choice(("200", "206", "206", "404", "429", "999", "-1", "", "x" * 99))
        return Message(
            topic=topic,
            payload=self.payload(),
            correlation=self._chance.choice((correlation, correlation, b"", b"?" * 16)),
            user={"status": status, "v": self._chance.choice(_VERSIONS)},
        )

    def _size(self) -> int:
        return self._chance.choice(_SIZES)

    def _small(self) -> int:
        return self._chance.choice((0, 0, 1, 64, 1 << 62))


class _Complaints(logging.Handler):
    """What reached the last resort: a handler that raised, or a worker that met an error it did not know."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "the weights ran out" not in str(record.exc_info):
            self.found.append(f"{record.getMessage()}: {record.exc_info}")


class Target:
    """Both ends on one in-memory broker, with a question always open at the client."""

    def __init__(self) -> None:
        self._threads = threading.active_count()
        self.complaints = _Complaints()
        logging.getLogger("edge_teacher").addHandler(self.complaints)
        self.broker = MemoryBroker()
        self.device = Device()
        limits = Limits(answer_cache_bytes=1 << 20, max_queued_requests=8, answer_cache_s=5)
        self.answering = self.broker.connect()
        self.server = Server(self.answering, DEVICE, self.device.methods(), limits=limits)
        self.server.start()
        self.asking = self.broker.connect()
        self.caller = Caller(self.asking, COORDINATOR, max_answer_bytes=8 << 20, tick_s=0.02)
        self.attacker = self.broker.connect()
        self._open: Future[frame.Payload] | None = None
        self.correlation = b""

    def attack(self, hostile: Hostile) -> None:
        """One hostile message at each end, delivered as the connection would."""
        self.attacker.publish(hostile.to_server())
        message = hostile.to_client(self.open_question())
        topic = message.topic.replace(f"/{DEVICE}", "/silent")
        self.attacker.publish(replace(message, topic=topic))

    def open_question(self) -> bytes:
        """The correlation data of a question of the client's to the device `silent`."""
        if self._open is None or self._open.done():
            self._open = self.caller.submit("silent", "echo", Ask(), timeout_s=600)
            (pending,) = self.caller._pending.values()
            self.correlation = pending.request.correlation
        return self.correlation

    def hand(self, message: Message, *, to_server: bool) -> None:
        """To one end, on this thread: what its handlers raise comes out here."""
        transport = self.answering if to_server else self.asking
        for topic_filter, handler in transport._handlers:
            if matches(topic_filter, message.topic):
                handler(message)

    def survived(self) -> None:
        """Both ends still do their work, on the threads they began with."""
        said, _ = self.caller.call(DEVICE, "echo", Ask(text="alive"), answer=Said, timeout_s=60)
        assert said.text == "alive"
        assert self.complaints.found == []
        assert all(thread.is_alive() for thread in self.server._threads)
        assert self.caller._watch.is_alive()
        assert len(self.caller._pending) <= 1
        assert self.caller._memory.taken <= 8 << 20
        assert self.server._answers.nbytes <= 4 << 20

    def close(self) -> None:
        logging.getLogger("edge_teacher").removeHandler(self.complaints)
        self.caller.close()
        self.server.drain()
        for transport in (self.asking, self.attacker):
            transport.close()
        assert threading.active_count() <= self._threads + 4  # other tests' may still be ending
