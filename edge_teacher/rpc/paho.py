"""MQTT 5 through paho-mqtt, with Nagle's algorithm off: 22 requests per second become 1,400."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from paho.mqtt.client import Client, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_teacher.contract.errors import TooLarge, Unreachable
from edge_teacher.contract.limits import CHUNK_BYTES, KIB, MAX_PACKET_BYTES, UPLOAD_BYTES
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.backoff import Backoff
from edge_teacher.rpc.paho_client import FastClient, PackedProperties
from edge_teacher.rpc.socket_buffers import SocketBuffers
from edge_teacher.rpc.takeover import HUNG_UP, SESSION_TAKEN_OVER, Takeovers
from edge_teacher.rpc.transport import Handler, Message, deliver, matches

log = logging.getLogger(__name__)

_RECEIVE_MAXIMUM = 64
_SENT_UNACKNOWLEDGED = 20
"""What mosquitto takes; a broker that says less is sent less."""
_FIRST_RECONNECT_S = 0.5
_LONGEST_RECONNECT_S = 15.0
_MOST_WAITING = 1000
"""Messages that wait for a connection. Beyond, a new one is dropped: what matters is asked for again."""
_MOST_CHUNKS_UNACKNOWLEDGED = 10
_LARGEST_PACKET = UPLOAD_BYTES + 16 * KIB
"""An upload's piece, or an answer that is not cut yet, and what stands around it."""
_FLUSH_S = 5.0


def _properties(message: Message, packet: int) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]  # paho leaves it untyped
    if message.response_topic:
        properties.ResponseTopic = message.response_topic
    if message.correlation:
        properties.CorrelationData = message.correlation
    if message.expiry_s is not None:
        properties.MessageExpiryInterval = message.expiry_s
    if message.user:
        properties.UserProperty = list(message.user.items())
    return properties


def _acknowledged(published: MQTTMessageInfo) -> bool:
    try:
        return published.is_published()
    except (ValueError, RuntimeError):
        return True  # published without a connection: paho sends it with the next, and does not say when


class _Grant:
    """What the broker says to one SUBSCRIBE."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.refusal = ""


class PahoTransport:
    """A Transport to a real broker. Reconnects for ever, at first at once, then up to 15 s apart.

    However long the broker is away, what waits for it is bounded, and so are the threads: one.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        will: Message | None = None,
        bulk: bool = False,
        keepalive_s: int = 15,
        connect_timeout_s: float = 10,
    ) -> None:
        """Connects, or raises Unreachable with the reason. `bulk`: it carries the large messages."""
        self._address = address
        self._client_id = client_id
        self._takeovers = Takeovers()
        self._connected_at = 0.0
        self._buffers = SocketBuffers() if bulk else None
        self._unacknowledged: deque[MQTTMessageInfo] = deque()
        self._room_actions: list[Callable[[], None]] = []
        self._handlers: list[tuple[str, Handler]] = []
        self._connect_actions: list[Callable[[], None]] = []
        self._connected = threading.Event()
        self._answered = threading.Event()
        self._lost = False
        self._most_unacknowledged = _MOST_CHUNKS_UNACKNOWLEDGED
        self._refusals: set[str] = set()
        self._grants: dict[int, _Grant] = {}
        self._last_published: MQTTMessageInfo | None = None
        self._lock = threading.Lock()
        self._refusal = ""
        self._backoff = Backoff(first_s=_FIRST_RECONNECT_S, longest_s=_LONGEST_RECONNECT_S)
        self._problem = ""
        self._refused = False
        self._client = FastClient(
            self._on_message,
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
        )
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_subscribe = self._on_subscribe
        self._client.on_publish = self._on_publish
        self._client.on_socket_open = self._on_socket_open
        self._client.max_inflight_messages_set(_SENT_UNACKNOWLEDGED)
        self._client.max_queued_messages_set(_MOST_WAITING)
        self._come_back_later()
        context = address.ssl_context()
        if context is not None:
            self._client.tls_set_context(context)
        if will is not None:
            self._client.will_set(
                will.topic,
                bytes(will.payload),
                will.qos,
                will.retain,
                _properties(will, PacketTypes.WILLMESSAGE),
            )
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        properties.ReceiveMaximum = _RECEIVE_MAXIMUM
        try:
            self._client.connect(
                address.host, address.port, keepalive_s, clean_start=True, properties=properties
            )
        except OSError as error:
            raise Unreachable(
                f"no broker answers at {address}: {error}; is it running, and is the address right?"
            ) from error
        self._client.loop_start()
        self._answered.wait(connect_timeout_s)
        if not self._connected.is_set():
            reason = self._refusal or f"no answer within {connect_timeout_s:g} s"
            self._client.disconnect()
            self._client.loop_stop()
            raise Unreachable(f"the broker at {address} did not accept {client_id!r}: {reason}")

    def subscribe(self, topic_filter: str, handler: Handler, *, wait: bool = True) -> None:
        with self._lock:
            self._handlers.append((topic_filter, handler))
        self._subscribe(topic_filter, wait_s=10 if wait else 0)

    def unsubscribe(self, topic_filter: str) -> None:
        with self._lock:
            self._handlers = [(f, h) for f, h in self._handlers if f != topic_filter]
            self._client.unsubscribe(topic_filter)  # without a connection there is nothing to end

    def still_there(self) -> None:
        """Ask the broker for something, and wait. Raises Unreachable if it has ever ended this connection."""
        if not self._lost:
            self._subscribe("fedsa/v1/-", wait_s=10)
        if self._lost:
            raise Unreachable(f"the broker at {self._address} has ended a connection")

    def wait_connected(self, timeout_s: float) -> None:
        """Raises Unreachable when there is no connection by then."""
        if not self._connected.wait(timeout_s):
            raise Unreachable(f"the broker at {self._address} did not take this client back")

    def on_connect(self, action: Callable[[], None]) -> None:
        with self._lock:
            self._connect_actions.append(action)
            connected = self._connected.is_set()
        if connected:
            action()

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    @property
    def problem(self) -> str:
        """Why there is no connection, in the words of whoever refused it; empty while there is one."""
        return "" if self._connected.is_set() else self._problem

    @property
    def turned_at(self) -> float:
        """When this connection's thread last came round, on the monotonic clock; it does each second while
        connected, and between two tries to connect otherwise."""
        return self._client.turned_at

    @property
    def thread_alive(self) -> bool:
        return self._client.thread_alive

    def renew_certificates(self) -> None:
        """Read the TLS files again: the next connection shows them. Raises UsageError if they are unusable,
        and then keeps what there was."""
        context = self._address.ssl_context()
        if context is not None:
            self._client.show(context)

    @property
    def unreadable(self) -> int:
        """Messages refused because a text of theirs is not UTF-8."""
        return self._client.unreadable

    @property
    def room(self) -> bool:
        with self._lock:
            return self._count_unacknowledged() < self._most_unacknowledged

    def on_room(self, action: Callable[[], None]) -> None:
        with self._lock:
            self._room_actions.append(action)

    def publish(self, message: Message) -> None:
        if len(message.payload) > MAX_PACKET_BYTES - 4096:
            # Published, it would come back as DISCONNECT 0x95 and be sent again for ever.
            raise TooLarge(
                f"a message of {len(message.payload)} bytes exceeds the packet size of "
                f"{MAX_PACKET_BYTES}; send it in chunks"
            )
        if not message.qos:
            self._client.publish_unacknowledged(message)
            return
        properties: Any = PackedProperties(message)
        payload: Any = message.payload
        published = self._client.publish(
            message.topic, payload, message.qos, message.retain, properties
        )
        with self._lock:
            self._count_unacknowledged()
            self._unacknowledged.append(published)
            self._last_published = published

    def together(self) -> AbstractContextManager[None]:
        return self._client.together()

    def close(self) -> None:
        # paho sends no more than the receive maximum at once and forgets the rest at DISCONNECT;
        # the broker acknowledges in order, so the last acknowledgement is everybody's.
        if self._last_published is not None and self._connected.is_set():
            with contextlib.suppress(ValueError, RuntimeError):
                self._last_published.wait_for_publish(_FLUSH_S)
        self._client.disconnect()
        self._client.loop_stop()

    def _subscribe(self, topic_filter: str, wait_s: float = 0) -> None:
        grant = _Grant()
        with self._lock:
            _, identifier = self._client.subscribe(topic_filter, options=SubscribeOptions(qos=1))
            if identifier is None:  # there is no connection; the next one subscribes to it
                grant.refusal = "there is no connection"
                grant.answered.set()
            else:
                self._grants[identifier] = grant
        if wait_s and (not grant.answered.wait(wait_s) or grant.refusal):
            reason = grant.refusal or f"no answer within {wait_s:g} s"
            raise Unreachable(
                f"the broker at {self._address} did not grant {topic_filter!r}: {reason}"
            )

    def _on_connect(self, _c: Client, _u: Any, _f: Any, reason: ReasonCode, said: Any) -> None:
        refusal = str(reason) if reason.is_failure else ""
        most = getattr(said, "MaximumPacketSize", None)
        if most is not None and most < _LARGEST_PACKET:
            # Its answer to a larger one is DISCONNECT, and paho would send it again for ever.
            refusal = f"its packets end at {most} bytes, and {_LARGEST_PACKET} are needed: raise its limit"
        if refusal:
            if refusal != self._problem:  # once: it may say so every few seconds for a week
                log.warning("no connection to the broker at %s: %s", self._address, refusal)
            self._refusal = self._problem = refusal
            self._refused = True
            self._answered.set()
            return
        self._connected_at = time.monotonic()
        self._backoff.reset()
        self._come_back_later()
        unacknowledged = min(_SENT_UNACKNOWLEDGED, getattr(said, "ReceiveMaximum", 65535))
        self._most_unacknowledged = max(1, min(_MOST_CHUNKS_UNACKNOWLEDGED, unacknowledged - 1))
        with self._lock:
            filters = [topic_filter for topic_filter, _ in self._handlers]
        for topic_filter in filters:
            self._subscribe(topic_filter)
        # Behind the subscriptions: what is sent again may be answered at once.
        self._client.resend_within(unacknowledged)
        with self._lock:
            # Together: an action added meanwhile is run here or by who adds it, never by both.
            self._connected.set()
            self._client.may_write_directly = not self._address.tls
            actions = list(self._connect_actions)
        self._answered.set()
        for action in actions:
            try:
                action()
            except Exception:
                # paho would end the thread that keeps this connection alive.
                log.exception("an announcement after connecting to %s failed", self._address)

    def _on_disconnect(self, _c: Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
        self._client.may_write_directly = False
        self._client.turned()
        established = self._connected.is_set()
        self._connected.clear()
        self._lost = True
        with self._lock:
            unanswered, self._grants = self._grants, {}
        for grant in unanswered.values():
            grant.refusal = "the connection was lost"
            grant.answered.set()
        if not self._answered.is_set():
            # A handshake refused, or no broker at all: it will not get better by waiting.
            self._refusal = self._refusal or f"it hung up ({reason})"
            self._answered.set()
            return
        lasted_s = time.monotonic() - self._connected_at
        if established:
            self._problem = f"it ended the connection ({reason})"
        else:
            self._come_back_later()
            if not self._refused:
                # With TLS 1.3 a client learns so, and no sooner, that its certificate is not taken.
                self._problem = f"it hangs up before it has accepted this client ({reason})"
        self._refused = False
        if reason.value == SESSION_TAKEN_OVER:
            wait_s = self._takeovers.told(lasted_s)
            self._stay_away(wait_s)
            log.warning(
                "another client has connected to the broker at %s with the id %r, which ended this one's "
                "session: give each client a name of its own; trying again in %.1f s",
                self._address,
                self._client_id,
                wait_s,
            )
        elif (
            established
            and reason.value == HUNG_UP
            and (suspect_s := self._takeovers.suspected(lasted_s)) is not None
        ):
            self._stay_away(suspect_s)
            log.warning(
                "the broker at %s ends every connection of the client %r soon after it begins: has "
                "another client the same id? trying again in %.1f s",
                self._address,
                self._client_id,
                suspect_s,
            )
        elif reason.is_failure and established:
            log.warning("lost the broker at %s: %s; reconnecting", self._address, reason)

    def _on_connect_fail(self, _c: Client, _u: Any) -> None:
        self._client.turned()
        # paho calls this while it handles the error, and does not hand it over.
        error = sys.exc_info()[1]
        self._problem = f"it cannot be reached: {error}"
        self._come_back_later()

    def _come_back_later(self) -> None:
        """paho doubles a wait by itself, and has no jitter: it is told each wait instead."""
        self._stay_away(self._backoff.next_s())

    def _stay_away(self, wait_s: Any) -> None:
        self._client.reconnect_delay_set(wait_s, wait_s)  # paho says int, and takes a float

    def _on_subscribe(
        self, _c: Client, _u: Any, identifier: int, reasons: list[ReasonCode], _p: Any
    ) -> None:
        with self._lock:
            grant = self._grants.pop(identifier, None)
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            log.warning("the broker at %s refused a subscription: %s", self._address, refused[0])
        if grant is not None:
            grant.refusal = ", ".join(refused)
            grant.answered.set()

    def _on_socket_open(self, _c: Client, _u: Any, connection: Any) -> None:
        # A TLS socket and a Unix socket may refuse; both work without.
        with contextlib.suppress(OSError, AttributeError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._buffers is not None:
                self._buffers.opened(connection)

    def _count_unacknowledged(self) -> int:
        """The broker acknowledges in order."""
        waiting = self._unacknowledged
        while waiting and _acknowledged(waiting[0]):
            waiting.popleft()
        return len(waiting)

    def _on_publish(self, _c: Client, _u: Any, _m: int, reason: ReasonCode, _p: Any) -> None:
        if reason.is_failure and str(reason) not in self._refusals:
            self._refusals.add(str(reason))  # said once: access rules refuse every message alike
            log.warning("the broker at %s refuses messages: %s", self._address, reason)
        if self._buffers is not None:
            self._buffers.moved(CHUNK_BYTES)
        # paho notes this acknowledgement after it has called: the room it makes is seen at the next.
        with self._lock:
            actions = list(self._room_actions)
        for action in actions:
            try:
                action()
            except Exception:
                log.exception("sending on to %s failed", self._address)

    def _on_message(self, message: Message) -> None:
        if self._buffers is not None:
            self._buffers.moved(len(message.payload))
        with self._lock:
            handlers = [h for f, h in self._handlers if matches(f, message.topic)]
        deliver(handlers, message)
