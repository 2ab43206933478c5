"""The one seam to the network. `paho.py` is MQTT; `memory.py` is the same without a socket."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Message:
    """An MQTT 5 PUBLISH (OASIS MQTT 5.0, section 3.3), as far as the contract uses it."""

    topic: str
    payload: bytes | bytearray | memoryview
    qos: int = 1
    retain: bool = False
    response_topic: str = ""
    correlation: bytes = b""
    expiry_s: int | None = None
    user: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Message], None]


class Transport(Protocol):
    """A connection to a broker that keeps itself alive.

    Handlers run on the connection's thread and must return at once: anything that computes goes to a
    worker, or the keepalive starves and the broker hangs up.
    """

    def subscribe(self, topic_filter: str, handler: Handler, *, wait: bool = True) -> None:
        """Once the broker has granted it; again by itself after every reconnect.

        Without `wait` it returns at once: what is published afterwards comes behind it.
        """
        ...

    def unsubscribe(self, topic_filter: str) -> None:
        """Hear nothing more by this filter, now and after a reconnect; returns at once."""
        ...

    def on_connect(self, action: Callable[[], None]) -> None:
        """Run `action` after every successful (re)connection, and now if there is one."""
        ...

    @property
    def connected(self) -> bool:
        """Whether there is a connection now. What is published without one is sent with the next."""
        ...

    @property
    def room(self) -> bool:
        """Whether one more chunk can be published without a long queue of them."""
        ...

    def on_room(self, action: Callable[[], None]) -> None:
        """Run `action`, on the connection's thread, when there may be room again."""
        ...

    def publish(self, message: Message) -> None:
        """Queue for sending; returns at once. Raises TooLarge above the contract's packet size."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """What this thread publishes with QoS 0 meanwhile may wait for the end of it, and goes as one."""
        ...

    def close(self) -> None:
        """Send what is queued, disconnect in good order (the will is not sent), end the thread."""
        ...


def matches(topic_filter: str, topic: str) -> bool:
    """MQTT 5.0 section 4.7: `+` is one level, a final `#` is all further ones, the parent included.

    Neither stands for a first level that begins with `$`: those are the broker's own.
    """
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for i, want in enumerate(wanted):
        if want == "#":
            return True
        if i >= len(levels) or want not in ("+", levels[i]):
            return False
    return len(wanted) == len(levels)


def deliver(handlers: Iterable[Handler], message: Message) -> None:
    """Hand `message` over. One bad message must not end the thread that keeps a connection alive."""
    for handler in handlers:
        try:
            handler(message)
        except Exception:
            log.exception("a message on %s could not be handled", message.topic)
