"""Over a real mosquitto: what MQTT promises, and what it does when things die."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_teacher.contract.errors import TooLarge, Unreachable, UsageError
from edge_teacher.contract.limits import CHUNK_BYTES, MAX_PACKET_BYTES, Limits
from edge_teacher.rpc.address import BrokerAddress, parse_broker
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.serve import Server
from edge_teacher.rpc.transport import Message
from tests.brokers import Authority, Mosquitto, free_port
from tests.edge_teacher.rpc.wire import DEVICE, Ask, Device, Said, eventually, noise

WAIT_S = 20


class Inbox:
    def __init__(self, transport: PahoTransport, topic_filter: str) -> None:
        self.messages: list[Message] = []
        self._arrived = threading.Condition()
        transport.subscribe(topic_filter, self._take)

    def _take(self, message: Message) -> None:
        with self._arrived:
            self.messages.append(message)
            self._arrived.notify_all()

    def wait(self, count: int) -> list[Message]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.messages) >= count, WAIT_S), (
                f"{len(self.messages)} of {count} messages came"
            )
            return list(self.messages)


@pytest.fixture
def pair(mosquitto: Mosquitto) -> Iterator[tuple[PahoTransport, PahoTransport]]:
    a, b = (PahoTransport(mosquitto.address, name) for name in ("a", "b"))
    yield a, b
    a.close()
    b.close()


def test_every_property_survives(pair: tuple[PahoTransport, PahoTransport]) -> None:
    inbox = Inbox(pair[1], "x/+")
    sent = Message(
        topic="x/y",
        payload=bytes(range(256)),
        response_topic="r/ü",
        correlation=b"\0\xff" * 8,
        expiry_s=100,
        user={"status": "200", "ü": "ß"},
    )
    pair[0].publish(sent)
    (received,) = inbox.wait(1)
    assert received == sent


def test_a_retained_message_meets_a_later_subscriber_and_an_empty_one_clears_it(
    pair: tuple[PahoTransport, PahoTransport],
) -> None:
    a, b = pair
    ack = Inbox(a, "kept/+")
    a.publish(Message(topic="kept/1", payload=b"here", retain=True))
    ack.wait(1)
    live = Inbox(b, "kept/1")
    (found,) = live.wait(1)
    assert (found.payload, found.retain) == (b"here", True)
    a.publish(Message(topic="kept/1", payload=b"", retain=True))
    a.publish(Message(topic="kept/2", payload=b"next", retain=True))
    ack.wait(3)
    live.wait(2)  # what b hears of it as it happens is not for the one who comes late
    late = Inbox(b, "kept/#")
    assert [m.topic for m in late.wait(1)] == ["kept/2"]


def test_messages_of_one_connection_stay_in_order(
    pair: tuple[PahoTransport, PahoTransport],
) -> None:
    inbox = Inbox(pair[1], "n")
    for i in range(300):
        pair[0].publish(Message(topic="n", payload=str(i).encode()))
    assert [int(m.payload) for m in inbox.wait(300)] == list(range(300))


def test_closing_sends_all_that_was_published_before(
    pair: tuple[PahoTransport, PahoTransport], mosquitto: Mosquitto
) -> None:
    """More than the broker takes at once: what a device says last is that it is offline."""
    inbox = Inbox(pair[0], "last/#")
    brief = PahoTransport(mosquitto.address, "brief")
    for i in range(500):
        brief.publish(Message(topic="last/words", payload=str(i).encode()))
    brief.close()
    assert [int(m.payload) for m in inbox.wait(500)] == list(range(500))


def test_a_handler_that_fails_does_not_end_the_connection(
    pair: tuple[PahoTransport, PahoTransport],
) -> None:
    def fails(message: Message) -> None:
        raise ValueError("bad")

    pair[1].subscribe("x", fails)
    inbox = Inbox(pair[1], "x")
    for _ in range(2):
        pair[0].publish(Message(topic="x", payload=b"1"))
    assert len(inbox.wait(2)) == 2


def test_a_message_beyond_the_packet_size_is_never_published(
    pair: tuple[PahoTransport, PahoTransport],
) -> None:
    with pytest.raises(TooLarge, match=str(MAX_PACKET_BYTES)):
        pair[0].publish(Message(topic="x", payload=bytes(MAX_PACKET_BYTES)))
    inbox = Inbox(pair[1], "x")
    pair[0].publish(Message(topic="x", payload=bytes(MAX_PACKET_BYTES - 4096)))
    assert len(inbox.wait(1)[0].payload) == MAX_PACKET_BYTES - 4096


def nodelay(transport: PahoTransport) -> int:
    connection = transport._client.socket()
    assert connection is not None
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_nagle_is_off(pair: tuple[PahoTransport, PahoTransport]) -> None:
    assert nodelay(pair[0])


def test_question_and_chunked_answer(pair: tuple[PahoTransport, PahoTransport]) -> None:
    device = Device()
    server = Server(pair[0], DEVICE, device.methods(), limits=Limits())
    server.start()
    caller = Caller(pair[1], "ada")
    try:
        count = 9 * CHUNK_BYTES + 5
        _, tensors = caller.call(DEVICE, "echo", Ask(bytes_back=count), answer=Said, timeout_s=60)
        assert np.array_equal(tensors["noise"], noise(count))
        assert device.executed == [""]
    finally:
        caller.close()
        server.drain()


def test_two_clients_of_one_id_are_told_of_it_and_do_not_fight_for_long(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    """This broker gives no reason: it just hangs up."""
    ends = [PahoTransport(mosquitto.address, "d1") for _ in range(2)]
    try:
        eventually(lambda: "client 'd1' soon after it begins: has another client" in caplog.text)
        waits = [end._client._reconnect_min_delay for end in ends]
        assert max(waits) >= 1.5
    finally:
        for end in ends:
            end.close()


class TestUnreachable:
    def test_nobody_there(self) -> None:
        port = free_port()
        with pytest.raises(Unreachable, match=f"no broker answers at mqtt://127.0.0.1:{port}"):
            PahoTransport(BrokerAddress(host="127.0.0.1", port=port), "a")

    def test_a_name_that_does_not_resolve(self) -> None:
        with pytest.raises(Unreachable, match="no broker answers"):
            PahoTransport(BrokerAddress(host="nowhere.invalid", port=1883), "a")

    def test_something_that_is_no_broker(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = BrokerAddress(host="127.0.0.1", port=silent.getsockname()[1])
            with pytest.raises(Unreachable, match=r"no answer within 0\.2 s"):
                PahoTransport(address, "a", connect_timeout_s=0.2)

    def test_something_that_hangs_up_is_reported_at_once(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def hang_up() -> None:
                while True:
                    try:
                        connection, _ = server.accept()
                    except OSError:
                        return
                    connection.close()

            threading.Thread(target=hang_up, daemon=True).start()
            began = time.monotonic()
            address = BrokerAddress(host="127.0.0.1", port=server.getsockname()[1])
            with pytest.raises(Unreachable, match="did not accept 'a'"):
                PahoTransport(address, "a")
            assert time.monotonic() - began < 8
            server.shutdown(socket.SHUT_RDWR)

    def test_a_broker_that_wants_a_password(self, tmp_path: Path) -> None:
        broker = Mosquitto(tmp_path, "allow_anonymous false").start()
        try:
            with pytest.raises(Unreachable, match="did not accept 'a': Not authorized"):
                PahoTransport(broker.address, "a")
        finally:
            broker.kill()


class TestRestart:
    def test_subscriptions_births_and_what_was_said_meanwhile(self, mosquitto: Mosquitto) -> None:
        listener = PahoTransport(mosquitto.address, "listener")
        talker = PahoTransport(mosquitto.address, "talker")
        inbox = Inbox(listener, "news/#")
        # On its own connection a birth comes after the subscriptions: it hears itself.
        # QoS 0: one whose acknowledgement dies with the broker would rightly be said twice.
        birth = Message(topic="news/birth", payload=b"", qos=0)
        listener.on_connect(lambda: listener.publish(birth))
        inbox.wait(1)  # there is a connection already
        try:
            mosquitto.kill()
            mosquitto.start()
            inbox.wait(2)
            talker.publish(Message(topic="news/1", payload=b"said while it may still be away"))
            heard = [message.topic for message in inbox.wait(3)]
            assert heard == ["news/birth", "news/birth", "news/1"]
            assert nodelay(listener)
        finally:
            listener.close()
            talker.close()

    def test_a_question_outlives_the_broker(self, mosquitto: Mosquitto) -> None:
        ends = [PahoTransport(mosquitto.address, name) for name in (DEVICE, "ada")]
        device = Device()
        server = Server(ends[0], DEVICE, device.methods(), limits=Limits())
        server.start()
        caller = Caller(ends[1], "ada", retry_s=0.5, tick_s=0.05)
        try:
            future = caller.submit(DEVICE, "hold", Ask(text="still here?"), timeout_s=60)
            assert device.begun.acquire(timeout=WAIT_S)
            mosquitto.kill()
            device.may_go_on.set()
            mosquitto.start()
            assert future.result(60)
            assert device.executed == ["still here?"]
        finally:
            caller.close()
            server.drain()
            for end in ends:
                end.close()

    def test_closing_without_a_broker_does_not_hang(self, mosquitto: Mosquitto) -> None:
        transport = PahoTransport(mosquitto.address, "a")
        mosquitto.kill()
        transport.publish(Message(topic="x", payload=b"nobody will hear"))
        began = time.monotonic()
        transport.close()
        assert time.monotonic() - began < 8


_VICTIM = """
import sys, threading
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.transport import Message
will = Message(topic="victim/state", payload=b"dead", retain=True)
transport = PahoTransport(BrokerAddress(host="127.0.0.1", port=int(sys.argv[1])), "victim", will=will)
transport.publish(Message(topic="victim/state", payload=b"alive", retain=True))
sys.stdin.read()
transport.close()
"""


class TestWill:
    @pytest.fixture
    def victim(self, mosquitto: Mosquitto) -> Iterator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, str(mosquitto.port)], stdin=subprocess.PIPE
        )
        yield process
        process.kill()
        process.communicate()

    def test_a_killed_process_leaves_its_will(
        self, victim: subprocess.Popen[bytes], pair: tuple[PahoTransport, PahoTransport]
    ) -> None:
        inbox = Inbox(pair[0], "victim/state")
        assert inbox.wait(1)[0].payload == b"alive"
        os.kill(victim.pid, signal.SIGKILL)
        assert inbox.wait(2)[1].payload == b"dead"
        assert Inbox(pair[1], "victim/+").wait(1)[0].payload == b"dead"

    def test_an_orderly_end_does_not(
        self, victim: subprocess.Popen[bytes], pair: tuple[PahoTransport, PahoTransport]
    ) -> None:
        inbox = Inbox(pair[0], "victim/#")
        inbox.wait(1)
        victim.communicate(timeout=WAIT_S)
        assert victim.returncode == 0
        pair[1].publish(Message(topic="victim/fence", payload=b""))
        assert [m.topic for m in inbox.wait(2)] == ["victim/state", "victim/fence"]


class TestTls:
    @pytest.fixture
    def authority(self, tmp_path: Path) -> Authority:
        return Authority(tmp_path)

    @pytest.fixture
    def broker(self, tmp_path: Path, authority: Authority) -> Iterator[Mosquitto]:
        certificate, key = authority.issue("broker")
        broker = Mosquitto(
            tmp_path,
            f"cafile {authority.certificate}",
            f"certfile {certificate}",
            f"keyfile {key}",
            "require_certificate true",
            "use_identity_as_username true",
        ).start()
        yield broker
        broker.kill()

    @pytest.fixture
    def address(self, broker: Mosquitto, authority: Authority) -> BrokerAddress:
        certificate, key = authority.issue("d1")
        return parse_broker(
            f"mqtts://127.0.0.1:{broker.port}",
            ca=authority.certificate,
            certificate=certificate,
            key=key,
        )

    def test_both_sides_prove_themselves(self, address: BrokerAddress) -> None:
        a, b = (PahoTransport(address, name) for name in ("a", "b"))
        try:
            inbox = Inbox(b, "x")
            a.publish(Message(topic="x", payload=bytes(MAX_PACKET_BYTES - 4096)))
            assert len(inbox.wait(1)[0].payload) == MAX_PACKET_BYTES - 4096
            assert nodelay(a)
        finally:
            a.close()
            b.close()

    def test_a_tls_socket_is_written_by_one_thread_alone(
        self, address: BrokerAddress, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writers: set[threading.Thread] = set()
        send = ssl.SSLSocket.send

        def noting(self: ssl.SSLSocket, *a: Any, **k: Any) -> int:
            writers.add(threading.current_thread())
            return send(self, *a, **k)

        transport = PahoTransport(address, "a")
        monkeypatch.setattr(ssl.SSLSocket, "send", noting)
        inbox = Inbox(transport, "x")
        for qos in (0, 1):
            transport.publish(Message(topic="x", payload=b"1", qos=qos))
        inbox.wait(2)
        transport.close()
        assert len(writers) == 1
        assert threading.current_thread() not in writers

    def test_a_broker_of_another_authority_is_not_believed(
        self, address: BrokerAddress, tmp_path: Path
    ) -> None:
        stranger = Authority(tmp_path, "another authority")
        with pytest.raises(Unreachable, match="certificate verify failed"):
            PahoTransport(replace(address, ca=stranger.certificate), "a")

    def test_a_broker_of_another_name_is_not_believed(self, address: BrokerAddress) -> None:
        with pytest.raises(Unreachable, match="certificate"):
            PahoTransport(replace(address, host="localhost"), "a")

    def test_without_a_certificate_nobody_comes_in(self, address: BrokerAddress) -> None:
        with pytest.raises(Unreachable, match="did not accept 'a'"):
            PahoTransport(replace(address, certificate=None, key=None), "a")

    def test_with_a_certificate_of_another_authority_neither(
        self, address: BrokerAddress, tmp_path: Path
    ) -> None:
        certificate, key = Authority(tmp_path, "another authority").issue("mallory")
        with pytest.raises(Unreachable, match="did not accept 'a'"):
            PahoTransport(replace(address, certificate=certificate, key=key), "a")

    def test_certificates_that_change_while_they_are_renewed_are_taken_as_they_were_proved(
        self,
        address: BrokerAddress,
        authority: Authority,
        broker: Mosquitto,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        prove = BrokerAddress.ssl_context

        def overtaken(self: BrokerAddress) -> ssl.SSLContext | None:
            proved = prove(self)
            assert self.key is not None
            self.key.write_bytes(b"half of a key")
            return proved

        transport = PahoTransport(address, "a")
        try:
            authority.issue("d1")
            with monkeypatch.context() as patched:
                patched.setattr(BrokerAddress, "ssl_context", overtaken)
                transport.renew_certificates()
            with pytest.raises(UsageError, match="cannot be used"):
                transport.renew_certificates()
            broker.kill()
            eventually(lambda: not transport.connected)
            broker.start()
            transport.wait_connected(WAIT_S)
        finally:
            transport.close()

    def test_without_tls_nobody_comes_in(self, address: BrokerAddress) -> None:
        with pytest.raises(Unreachable, match="did not accept 'a'"):
            PahoTransport(replace(address, tls=False), "a")
