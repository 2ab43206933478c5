"""Two connections of one client, over mosquitto as it is run in production."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from edge_teacher.contract import frame
from edge_teacher.contract.errors import Unreachable
from edge_teacher.contract.limits import MIB, Limits
from edge_teacher.rpc.address import BrokerAddress, parse_broker
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.pair import Pair, connect_pair
from edge_teacher.rpc.serve import Server
from edge_teacher.rpc.transport import Message
from tests.brokers import Authority, Mosquitto
from tests.edge_teacher.rpc.test_paho import Inbox
from tests.edge_teacher.rpc.wire import DEVICE, Ask, Device, Said, noise

WAIT_S = 20

ACL = """\
pattern readwrite fedsa/v1/%u/state
pattern readwrite fedsa/v1/%u/card
pattern write fedsa/v1/%u/telemetry
pattern read fedsa/v1/%u/req/#
pattern read fedsa/v1/%u/put/#
pattern read fedsa/v1/%u/ctl
pattern write fedsa/v1/+/rsp/%u
pattern write fedsa/v1/+/data/%u
user ada
topic read fedsa/v1/+/state
topic read fedsa/v1/+/card
topic read fedsa/v1/+/telemetry
topic read fedsa/v1/ada/rsp/+
topic read fedsa/v1/ada/data/+
topic write fedsa/v1/+/req/#
topic write fedsa/v1/+/put/#
topic write fedsa/v1/+/ctl
"""
"""As docs/protocol.md has it."""


class Secured:
    """mosquitto with mutual TLS and access rules by certificate."""

    def __init__(self, folder: Path, *lines: str) -> None:
        self.authority = Authority(folder)
        certificate, key = self.authority.issue("broker")
        rules = folder / "acl"
        rules.write_text(ACL)
        self.broker = Mosquitto(
            folder,
            f"cafile {self.authority.certificate}",
            f"certfile {certificate}",
            f"keyfile {key}",
            "require_certificate true",
            "use_identity_as_username true",
            f"acl_file {rules}",
            *lines,
        ).start()

    def address(self, name: str) -> BrokerAddress:
        certificate, key = self.authority.issue(name)
        url = f"mqtts://127.0.0.1:{self.broker.port}"
        return parse_broker(url, ca=self.authority.certificate, certificate=certificate, key=key)


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as ends:
        yield ends


@pytest.fixture
def secured(tmp_path: Path, ends: ExitStack) -> Secured:
    secured = Secured(tmp_path)
    ends.callback(secured.broker.kill)
    return secured


def converse(ends: ExitStack, theirs: Pair, ours: Pair) -> tuple[Device, Caller]:
    device = Device()
    server = Server(theirs.control, DEVICE, device.methods(), limits=Limits(), bulk=theirs.bulk)
    server.start()
    caller = Caller(ours.control, "ada", bulk=ours.bulk, retry_s=1, tick_s=0.05)
    for end in (ours.close, theirs.close, server.drain, caller.close):
        ends.callback(end)
    return device, caller


def check_both_ways(caller: Caller) -> None:
    for _ in range(2):  # the second request goes on the bulk connection, where there is one
        said, tensors = caller.call(
            DEVICE, "echo", Ask(text="a", bytes_back=3 * MIB), {"up": noise(500_000)}, answer=Said
        )
        assert said.text == "a"
        assert np.array_equal(tensors["noise"], noise(3 * MIB))
        assert np.array_equal(tensors["up"], noise(500_000))


def test_mutual_tls_with_access_rules(secured: Secured, ends: ExitStack) -> None:
    theirs = connect_pair(secured.address(DEVICE), DEVICE)
    ours = connect_pair(secured.address("ada"), "ada")
    assert theirs.bulk is not theirs.control
    device, caller = converse(ends, theirs, ours)
    check_both_ways(caller)
    assert device.executed == ["a", "a"]


def test_tls_without_client_certificates(tmp_path: Path, ends: ExitStack) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("broker")
    broker = Mosquitto(
        tmp_path, f"certfile {certificate}", f"keyfile {key}", "allow_anonymous true"
    ).start()
    ends.callback(broker.kill)
    address = parse_broker(f"mqtts://127.0.0.1:{broker.port}", ca=authority.certificate)
    device, caller = converse(ends, connect_pair(address, DEVICE), connect_pair(address, "ada"))
    check_both_ways(caller)
    assert device.executed == ["a", "a"]


def test_a_device_sees_nothing_of_another_and_cannot_speak_for_it(
    secured: Secured, ends: ExitStack
) -> None:
    theirs = connect_pair(secured.address(DEVICE), DEVICE)
    ours = connect_pair(secured.address("ada"), "ada")
    mallory = connect_pair(secured.address("mallory"), "mallory")
    ends.callback(mallory.close)
    device, caller = converse(ends, theirs, ours)
    heard = Inbox(mallory.control, "fedsa/v1/#")  # type: ignore[arg-type]
    seen = Inbox(ours.control, "fedsa/v1/+/state")  # type: ignore[arg-type]
    lie = frame.encode(Said(text="a lie", times=1))
    for topic in (
        f"fedsa/v1/ada/rsp/{DEVICE}",
        f"fedsa/v1/{DEVICE}/state",
        f"fedsa/v1/{DEVICE}/req/echo",
    ):
        mallory.control.publish(Message(topic=topic, payload=lie))
    mallory.control.publish(Message(topic="fedsa/v1/mallory/state", payload=b"here"))
    assert [m.topic for m in seen.wait(1)] == ["fedsa/v1/mallory/state"]
    check_both_ways(caller)
    assert device.executed == ["a", "a"]
    assert [m.topic for m in heard.messages] in ([], ["fedsa/v1/mallory/state"])


def test_where_both_connections_have_one_id_they_become_one(
    tmp_path: Path, ends: ExitStack
) -> None:
    """`use_username_as_clientid`: the broker lets only one of them live."""
    secured = Secured(tmp_path, "use_username_as_clientid true")
    ends.callback(secured.broker.kill)
    theirs = connect_pair(secured.address(DEVICE), DEVICE)
    ours = connect_pair(secured.address("ada"), "ada")
    assert theirs.bulk is theirs.control
    assert ours.bulk is ours.control
    _, caller = converse(ends, theirs, ours)
    check_both_ways(caller)


def test_without_a_broker(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    with pytest.raises(Unreachable):
        connect_pair(broker.address, DEVICE)


def test_chunks_and_large_requests_travel_on_the_second_connection(
    tmp_path: Path, ends: ExitStack
) -> None:
    memory = MemoryBroker()
    theirs = Pair(memory.connect(), memory.connect())
    ours = Pair(memory.connect(), memory.connect())
    sizes: dict[str, list[int]] = {}

    def watch(name: str, transport: object) -> None:
        publish = transport.publish  # type: ignore[attr-defined]

        def noting(message: Message) -> None:
            sizes.setdefault(name, []).append(len(message.payload))
            publish(message)

        transport.publish = noting  # type: ignore[attr-defined]

    for name, transport in (
        ("device control", theirs.control),
        ("device bulk", theirs.bulk),
        ("coordinator control", ours.control),
        ("coordinator bulk", ours.bulk),
    ):
        watch(name, transport)
    _, caller = converse(ends, theirs, ours)
    caller.call(DEVICE, "echo", Ask(), answer=Said)
    check_both_ways(caller)
    assert max(sizes["device control"]) < MIB
    assert max(sizes["coordinator control"]) < 1000
    assert len(sizes["device bulk"]) >= 12
    assert sizes["coordinator bulk"] == [s for s in sizes["coordinator bulk"] if s > 500_000]


def test_control_does_not_wait_behind_data(tmp_path: Path, ends: ExitStack) -> None:
    broker = Mosquitto(tmp_path).start()
    ends.callback(broker.kill)
    theirs = connect_pair(broker.address, DEVICE)
    ours = connect_pair(broker.address, "ada")
    server_device, caller = converse(ends, theirs, ours)
    done = threading.Event()
    large = caller.submit(DEVICE, "echo", Ask(bytes_back=32 * MIB), timeout_s=60)
    large.add_done_callback(lambda _future: done.set())
    small = 0
    while not done.is_set():
        caller.call(DEVICE, "echo", Ask(text="small"), answer=Said)
        small += 1
    assert large.exception() is None
    # Behind 32 MiB in one line there would be room for none or one.
    assert small >= 5
    assert server_device.executed.count("small") == small


def test_two_connections_that_are_well_and_ones_that_are_not(
    mosquitto: Mosquitto, ends: ExitStack
) -> None:
    pair = connect_pair(mosquitto.address, DEVICE)
    ends.callback(pair.close)
    assert (pair.stuck(), pair.problem) == ("", "")
    turned_at = pair.bulk.turned_at
    while pair.bulk.turned_at == turned_at:  # at least once a second, also when nothing happens
        threading.Event().wait(0.01)
    begun, go_on = threading.Event(), threading.Event()

    def hang(_message: Message) -> None:
        begun.set()
        go_on.wait(WAIT_S)

    pair.control.subscribe("fedsa/v1/hang/state", hang)
    pair.bulk.publish(Message(topic="fedsa/v1/hang/state", payload=b""))
    assert begun.wait(WAIT_S)
    pair.control._client.turned_at -= 61  # so long ago, and its thread cannot come round
    assert "the thread of the control connection has not come round for 61 s" in pair.stuck()
    go_on.set()
    end = time.monotonic() + WAIT_S
    while pair.stuck():
        assert time.monotonic() < end
        threading.Event().wait(0.01)
    pair.close()
    assert "connection has ended" in pair.stuck()


def test_a_first_connection_that_is_given_up_does_not_come_back(
    tmp_path: Path, ends: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fight with the one that is tried next for their one name."""
    secured = Secured(tmp_path, "use_username_as_clientid true")
    ends.callback(secured.broker.kill)
    made: list[PahoTransport] = []

    def lost(self: PahoTransport, _timeout_s: float) -> None:
        made.append(self)
        raise Unreachable("it went meanwhile")

    monkeypatch.setattr(PahoTransport, "wait_connected", lost)
    with pytest.raises(Unreachable, match="it went meanwhile"):
        connect_pair(secured.address(DEVICE), DEVICE)
    (control,) = made
    assert not control.thread_alive
    assert not control.connected
