"""A broker and its clients inside one process: the same seam, no socket.

Messages arrive on a thread of each client's own, in order, as with a real one. Wills and retained
messages work; QoS, expiry and access rules are the real broker's business.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from edge_teacher.contract.errors import TooLarge, Unreachable
from edge_teacher.contract.limits import MAX_PACKET_BYTES
from edge_teacher.rpc.transport import Handler, Message, deliver, matches

Fault = Callable[[Message], list[Message]]


class MemoryBroker:
    """`fault`, if given, replaces every published message by a list: lose, repeat or damage it there."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self._clients: list[MemoryTransport] = []
        self._retained: dict[str, Message] = {}
        self._lock = threading.Lock()

    def connect(self, will: Message | None = None) -> MemoryTransport:
        client = MemoryTransport(self, will)
        self.take(client)
        return client

    def take(self, client: MemoryTransport) -> None:
        """From now on it is delivered what it subscribes to."""
        with self._lock:
            self._clients.append(client)

    def route(self, message: Message) -> None:
        with self._lock:
            for sent in self.fault(message) if self.fault else [message]:
                if sent.retain:
                    self._retained[sent.topic] = sent
                    if not sent.payload:
                        del self._retained[sent.topic]
                for client in self._clients:
                    client.deliver(sent)

    def retained(self, topic_filter: str) -> list[Message]:
        with self._lock:
            return [m for t, m in self._retained.items() if matches(topic_filter, t)]

    def forget(self, client: MemoryTransport) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._clients.remove(client)


class MemoryTransport:
    """A Transport without a network."""

    def __init__(self, broker: MemoryBroker, will: Message | None) -> None:
        self._broker = broker
        self._will = will
        self._handlers: list[tuple[str, Handler]] = []
        self._inbox: queue.SimpleQueue[tuple[Handler, Message] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memory-transport", daemon=True)
        self._thread.start()

    def subscribe(self, topic_filter: str, handler: Handler, *, wait: bool = True) -> None:
        self._handlers.append((topic_filter, handler))
        for message in self._broker.retained(topic_filter):
            self._inbox.put((handler, message))

    def unsubscribe(self, topic_filter: str) -> None:
        self._handlers = [(f, h) for f, h in self._handlers if f != topic_filter]

    def on_connect(self, action: Callable[[], None]) -> None:
        action()

    @property
    def connected(self) -> bool:
        return not self._closed

    @property
    def room(self) -> bool:
        return not self._closed

    def on_room(self, action: Callable[[], None]) -> None:
        """There always is."""

    def publish(self, message: Message) -> None:
        if self._closed:
            raise Unreachable("this in-memory connection is closed")
        if len(message.payload) > MAX_PACKET_BYTES - 4096:
            raise TooLarge(f"a message of {len(message.payload)} bytes exceeds the packet size")
        self._broker.route(message)

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        self._end()

    def kill(self) -> None:
        """The process died: the broker sends the will."""
        self._end()
        if self._will is not None:
            self._broker.route(self._will)

    def deliver(self, message: Message) -> None:
        for topic_filter, handler in self._handlers:
            if matches(topic_filter, message.topic):
                self._inbox.put((handler, message))

    def _end(self) -> None:
        self._closed = True
        self._broker.forget(self)
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            handler, message = item
            deliver([handler], message)
