"""A broker that is gone again and again: a week's worth of outages, at an accelerated pace."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_teacher.agent.connecting import Connecting
from edge_teacher.agent.service import Agent, AgentConfig
from edge_teacher.contract import frame
from edge_teacher.contract.messages import Card, Empty, State
from edge_teacher.rpc import paho
from edge_teacher.rpc.backoff import Backoff
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.transport import Message
from tests.brokers import Mosquitto
from tests.edge_teacher.nets import OWNER, TEACHER, teacher_bundle

WAIT_S = 30


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path)
    yield broker
    broker.kill()


def config(folder: Path) -> AgentConfig:
    (folder / "teacher.fedsa").write_bytes(teacher_bundle())
    return AgentConfig(
        device="d1",
        bundle=folder / "teacher.fedsa",
        owners=[OWNER.public_key()],
        coordinator_keys=[],
        state=folder / "state",
        telemetry_s=0.005,
    )


def until(wanted: bool, connecting: Connecting) -> None:
    end = time.monotonic() + WAIT_S
    while bool(connecting.problem) == wanted:
        assert time.monotonic() < end, connecting.problem
        assert connecting.stuck() == ""
        threading.Event().wait(0.005)


def counted() -> tuple[int, int]:
    """(threads, open files) of this process; without the timers of connections, which last two seconds."""
    gc.collect()
    threads = [t for t in threading.enumerate() if not isinstance(t, threading.Timer)]
    return len(threads), len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.timeout(240)
def test_nothing_grows_while_the_broker_comes_and_goes(
    broker: Mosquitto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(paho, "_FIRST_RECONNECT_S", 0.01)
    monkeypatch.setattr(paho, "_LONGEST_RECONNECT_S", 0.05)
    agent = Agent(config(tmp_path))
    connecting = Connecting(agent, broker.address, retry=Backoff(first_s=0.01, longest_s=0.05))
    with caplog.at_level(logging.INFO):
        connecting.start()  # there is no broker yet
        end = time.monotonic() + WAIT_S
        while "no broker answers" not in connecting.problem:
            assert time.monotonic() < end
        before: tuple[int, int] | None = None
        for outage in range(12):
            broker.start()
            until(True, connecting)
            transport = PahoTransport(broker.address, "ada")
            caller = Caller(transport, "ada", retry_s=0.5)
            found = caller.call("d1", "describe", Empty(), answer=Card, timeout_s=20)[0]
            assert found.teacher == TEACHER
            caller.close()
            transport.close()
            if outage == 2:  # by then everything has been made that is made once
                before = counted()
            broker.kill()
            until(False, connecting)
            assert agent.stuck(600) == ""
        assert before is not None
        # A connection that is being tried at this moment has a socket or not.
        threads, files = counted()
        assert threads <= before[0]
        assert files <= before[1] + 4
        assert agent._transport is not None
        waiting = len(agent._transport._client._out_messages)  # type: ignore[attr-defined]
        assert waiting <= 2 * 12  # telemetry is not kept, and births are few
        # Per outage a handful of lines, however many tries there were.
        assert len(caplog.records) < 12 * 10
    connecting.stop()
    agent.stop()


@pytest.mark.timeout(120)
def test_what_waits_for_a_connection_is_bounded(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that ends every connection before it acknowledges anything, for as long as it likes."""
    monkeypatch.setattr(paho, "_MOST_WAITING", 50)
    broker.start()
    transport = PahoTransport(broker.address, "d1")
    broker.kill()
    end = time.monotonic() + WAIT_S
    while transport.connected:
        assert time.monotonic() < end
    for i in range(500):
        transport.publish(Message(topic="fedsa/v1/d1/state", payload=bytes([i % 256])))
    assert len(transport._client._out_messages) == 50
    assert len(transport._unacknowledged) <= 51
    assert transport.problem
    broker.start()
    transport.wait_connected(WAIT_S)
    end = time.monotonic() + WAIT_S
    while transport._client._out_messages:  # what was kept is sent
        assert time.monotonic() < end
        threading.Event().wait(0.01)
    assert transport.problem == ""
    transport.close()


@pytest.mark.timeout(120)
def test_a_clock_that_jumps_changes_nothing(
    broker: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boards without a battery wake in 1970 and learn the time from the network, or lose it again."""
    broker.start()
    agent = Agent(config(tmp_path))
    connecting = Connecting(agent, broker.address)
    connecting.start()
    until(True, connecting)
    transport = PahoTransport(broker.address, "ada")
    caller = Caller(transport, "ada", retry_s=0.5)
    real = time.time
    uptimes = []
    try:
        for jump in (-real(), 10 * 365 * 86_400.0, -86_400.0):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            # With an expiry, which a wall clock would have let pass, or kept for ever.
            card, _ = caller.call("d1", "describe", Empty(), answer=Card, timeout_s=20)
            assert card.teacher == TEACHER
            assert agent.stuck(600) == ""
            assert connecting.stuck() == ""
            uptimes.append(agent.telemetry().uptime_s)
            told = agent.telemetry().answer_times["describe"]
            assert told.total_s < 60
    finally:
        monkeypatch.undo()
    assert uptimes == sorted(uptimes)
    assert uptimes[-1] < 3600
    caller.close()
    transport.close()
    connecting.stop()
    agent.stop()


def test_when_it_was_born_is_told_by_the_clock_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(config(tmp_path))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 1e9)
    early = agent._state(online=True)
    monkeypatch.setattr(time, "time", real)
    born = [frame.decode(m.payload, State)[0] for m in (early, agent._state(online=True))]
    assert abs(born[1].since_unix_s - real()) < 60
    assert born[0].since_unix_s < real() - 9e8
    assert born[0].session == born[1].session
