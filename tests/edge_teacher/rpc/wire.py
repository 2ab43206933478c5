"""A device that answers, a coordinator that asks, and a broker between them that can be made to fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from edge_teacher.contract import topics
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import Wire
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker, MemoryTransport
from edge_teacher.rpc.serve import Answer, Method, Server, Tensors
from edge_teacher.rpc.transport import Message

DEVICE, COORDINATOR = "d1", "ada"
RETRY_S, TICK_S = 0.08, 0.01


class Ask(Wire, frozen=True):
    text: str = ""
    bytes_back: int = 0


class Said(Wire, frozen=True):
    text: str
    times: int
    """How many requests had been executed."""


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8)


@dataclass
class Device:
    """Methods that count their executions, and one that can be held up."""

    executed: list[str] = field(default_factory=list)
    may_go_on: threading.Event = field(default_factory=threading.Event)
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def echo(self, ask: Ask, tensors: Tensors) -> Answer:
        self.executed.append(ask.text)
        answer = dict(tensors)
        if ask.bytes_back:
            answer["noise"] = noise(ask.bytes_back)
        return Said(text=ask.text, times=len(self.executed)), answer

    def hold(self, ask: Ask, tensors: Tensors) -> Answer:
        self.begun.release()
        assert self.may_go_on.wait(20)
        return self.echo(ask, tensors)

    def fail(self, ask: Ask, tensors: Tensors) -> Answer:
        raise ZeroDivisionError("the weights ran out")

    def change(self, ask: Ask, tensors: Tensors) -> Answer:
        """A command; it fails where it is asked to, after it has had its effect."""
        answer = self.echo(ask, tensors)
        return self.fail(ask, tensors) if ask.text == "fail" else answer

    def methods(self) -> dict[str, Method]:  # type: ignore[type-arg]
        return {
            "echo": Method(Ask, self.echo),
            "hold": Method(Ask, self.hold),
            "fail": Method(Ask, self.fail),
            "change": Method(Ask, self.change, changes=True),
        }


class Line(MemoryTransport):
    """A connection that can be cut: then it hears nothing, and what it says waits for the next one."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, None)
        self.waiting: list[Message] = []
        self.up = True
        self._actions: list[Callable[[], None]] = []
        broker.take(self)

    @property
    def connected(self) -> bool:
        return self.up

    def on_connect(self, action: Callable[[], None]) -> None:
        self._actions.append(action)
        action()

    def publish(self, message: Message) -> None:
        if self.up:
            super().publish(message)
        else:
            self.waiting.append(message)

    def deliver(self, message: Message) -> None:
        if self.up:
            super().deliver(message)

    def cut(self) -> None:
        self.up = False

    def mend(self) -> None:
        self.up = True
        waiting, self.waiting = self.waiting, []
        for message in waiting:
            self.publish(message)
        for action in self._actions:
            action()


def eventually(true: Callable[[], bool], within_s: float = 15) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end
        threading.Event().wait(0.001)


Lose = Callable[[Message], list[Message]]


@dataclass
class World:
    broker: MemoryBroker
    device: Device
    server: Server
    caller: Caller
    published: list[Message]
    """Everything that was sent, before faults."""
    device_transport: MemoryTransport

    def sent_to(self, channel: str) -> list[Message]:
        parsed = [(topics.parse(m.topic), m) for m in list(self.published)]
        return [m for topic, m in parsed if topic is not None and topic.channel == channel]


@contextmanager
def world(
    *,
    fault: Lose | None = None,
    limits: Limits | None = None,
    allowed: frozenset[str] = frozenset(),
    max_answer_bytes: int = 1 << 28,
    workers: int = 1,
    retry_s: float = RETRY_S,
) -> Iterator[World]:
    published: list[Message] = []

    def record(message: Message) -> list[Message]:
        published.append(message)
        return fault(message) if fault else [message]

    broker = MemoryBroker(record)
    device = Device()
    device_transport, coordinator_transport = broker.connect(), broker.connect()
    server = Server(
        device_transport,
        DEVICE,
        device.methods(),
        limits=limits or Limits(),
        allowed=allowed,
        workers=workers,
    )
    server.start()
    caller = Caller(
        coordinator_transport,
        COORDINATOR,
        max_answer_bytes=max_answer_bytes,
        retry_s=retry_s,
        tick_s=TICK_S,
    )
    try:
        yield World(broker, device, server, caller, published, device_transport)
    finally:
        device.may_go_on.set()
        caller.close()
        server.drain()
        coordinator_transport.close()
        device_transport.close()


def once(matches: Callable[[Message], bool], instead: list[Message] | None = None) -> Lose:
    """A fault that hits the first matching message only: lost, or replaced."""
    done: list[bool] = []

    def fault(message: Message) -> list[Message]:
        if done or not matches(message):
            return [message]
        done.append(True)
        return instead or []

    return fault


def channel_of(message: Message) -> str:
    parsed = topics.parse(message.topic)
    return parsed.channel if parsed else ""
