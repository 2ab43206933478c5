from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from coordinator.fleet import Fleet
from edge_teacher.contract import PROTOCOL, frame, topics
from edge_teacher.contract.errors import Unreachable
from edge_teacher.contract.messages import Empty, State
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker, MemoryTransport
from edge_teacher.rpc.transport import Message
from tests.coordinator.fleet_of_agents import world
from tests.edge_teacher.contract.test_messages import CARD


class Devices:
    """What devices publish, by hand."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.transport = self.broker.connect()

    def publish(self, topic: str, body: msgspec.Struct | None) -> None:
        payload = b"" if body is None else frame.encode(body)
        self.transport.publish(Message(topic=topic, payload=payload, retain=True))

    def state(
        self, name: str, *, online: bool = True, session: str = "1", leaving: bool = False
    ) -> None:
        state = State(
            online=online,
            session=session,
            software="x",
            protocol=PROTOCOL,
            since_unix_s=0,
            leaving=leaving,
        )
        self.publish(topics.state(name), state)

    def card(self, name: str, **changes: object) -> None:
        card = msgspec.structs.replace(CARD, **{"device": name, **changes})
        self.publish(topics.card(name), card)

    def born(self, name: str, session: str = "1") -> None:
        self.card(name)
        self.state(name, session=session)


@pytest.fixture
def devices() -> Devices:
    return Devices()


@pytest.fixture
def transport(devices: Devices) -> Iterator[MemoryTransport]:
    made = devices.broker.connect()
    yield made
    made.close()


@pytest.fixture
def caller(transport: MemoryTransport) -> Iterator[Caller]:
    made = Caller(transport, "ada", tick_s=0.02)
    yield made
    made.close()


def names(fleet: Fleet, **options: bool) -> list[str]:
    return [device.name for device in fleet.devices(**options)]


def settle(devices: Devices, transport: MemoryTransport) -> None:
    """All published before has been handled: a connection keeps the order."""
    passed = threading.Event()
    transport.subscribe("fence", lambda message: passed.set())
    devices.transport.publish(Message(topic="fence", payload=b""))
    assert passed.wait(10)


def test_those_who_came_before_and_after_by_name(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    devices.born("b")
    fleet = Fleet(transport, caller)
    devices.born("a")
    found = fleet.wait(2)
    assert [device.name for device in found] == ["a", "b"]
    assert found[0].card.device == "a"
    assert found[0].state.online


def test_without_a_card_or_a_birth_it_is_no_device_yet(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    devices.card("only-card")
    devices.state("only-state")
    fleet = Fleet(transport, caller)
    settle(devices, transport)
    assert names(fleet) == []


def test_one_that_is_offline_is_known_and_not_counted(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    devices.born("a")
    devices.born("b")
    devices.state("b", online=False)
    fleet = Fleet(transport, caller)
    settle(devices, transport)
    assert names(fleet) == ["a"]
    assert names(fleet, online_only=False) == ["a", "b"]


def test_too_few_is_one_sentence_that_names_those_who_came(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    fleet = Fleet(transport, caller)
    with pytest.raises(Unreachable, match=r"0 of 2 teachers .* \(online: none\)"):
        fleet.wait(2, timeout_s=0.05)
    devices.born("a")
    with pytest.raises(Unreachable, match=r"1 of 2 teachers .* \(online: a\)"):
        fleet.wait(2, timeout_s=0.05)


@pytest.mark.parametrize("payload", [b"", b"garbage", frame.encode(Empty())])
def test_what_is_cleared_or_no_message_of_ours_is_no_device_any_more(
    devices: Devices, transport: MemoryTransport, caller: Caller, payload: bytes
) -> None:
    devices.born("a")
    fleet = Fleet(transport, caller)
    fleet.wait(1)
    asked = caller.submit("a", "echo", Empty(), timeout_s=60)
    topic = topics.state("a")
    devices.transport.publish(Message(topic=topic, payload=payload, retain=True))
    with pytest.raises(Unreachable, match="a went offline"):
        asked.result(10)
    assert names(fleet, online_only=False) == []
    devices.born("a")
    assert fleet.wait(1)


def test_a_card_in_another_device_s_name_is_not_believed(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    devices.born("honest")
    devices.card("mallory", device="honest")
    devices.state("mallory")
    fleet = Fleet(transport, caller)
    settle(devices, transport)
    assert names(fleet) == ["honest"]


def test_foreign_topics_do_no_harm(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    fleet = Fleet(transport, caller)
    for name in ("-", " ", "ü", "a" * 65):
        devices.publish(f"fedsa/v1/{name}/state", Empty())
        devices.publish(f"fedsa/v1/{name}/card", CARD)
    devices.born("a")
    assert [device.name for device in fleet.wait(1)] == ["a"]


def test_what_is_asked_of_one_that_leaves_fails_at_once(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    for name in ("a", "b"):
        devices.born(name)
    Fleet(transport, caller).wait(2)
    asked = {name: caller.submit(name, "echo", Empty(), timeout_s=60) for name in ("a", "b")}
    devices.state("a", online=False, leaving=True)
    with pytest.raises(Unreachable, match="a went offline while it was asked for echo"):
        asked["a"].result(10)
    assert not asked["b"].done()


def test_one_that_is_away_for_a_moment_is_asked_again(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    """Its connection broke, or it restarted: the broker publishes its will, and it is back."""
    heard: queue.Queue[Message] = queue.Queue()
    devices.transport.subscribe(topics.requests("a"), heard.put)
    devices.born("a")
    Fleet(transport, caller).wait(1)
    asked = caller.submit("a", "echo", Empty(), timeout_s=60)
    first = heard.get(timeout=10)
    devices.state("a", online=False)
    settle(devices, transport)
    meanwhile = caller.submit("a", "echo", Empty(), timeout_s=60)
    devices.born("a", session="2")
    again = [heard.get(timeout=10) for _ in range(3)]
    assert first.correlation in {message.correlation for message in again}
    assert not asked.done()
    assert not meanwhile.done()


def test_one_that_stays_away_is_given_up(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    devices.born("a")
    Fleet(transport, caller, grace_s=0.1).wait(1)
    asked = caller.submit("a", "echo", Empty(), timeout_s=60)
    devices.state("a", online=False)
    with pytest.raises(Unreachable, match="a went offline while it was asked for echo"):
        asked.result(10)
    with pytest.raises(Unreachable, match="a went offline before it was asked"):
        caller.submit("a", "echo", Empty(), timeout_s=60)


def test_one_that_says_again_that_it_is_there_goes_on(
    devices: Devices, transport: MemoryTransport, caller: Caller
) -> None:
    """As every device does when the broker has restarted."""
    devices.born("a")
    Fleet(transport, caller).wait(1)
    asked = caller.submit("a", "echo", Empty(), timeout_s=60)
    devices.born("a")
    settle(devices, transport)
    assert not asked.done()


def test_real_agents_are_found_and_missed(tmp_path: Path) -> None:
    with world(tmp_path, "d1", "d2") as here:
        assert [d.name for d in here.fleet.wait(2, timeout_s=20)] == ["d1", "d2"]
        asked = here.caller.submit("d2", "nothing", Empty(), timeout_s=60)
        asked.exception(20)
        here.transports["d2"].kill()
        here.agents.pop("d2")._stopped.set()
        gone = threading.Event()
        here.transport.subscribe(topics.state("d2"), lambda message: gone.set())
        assert gone.wait(10)
        assert names(here.fleet) == ["d1"]
