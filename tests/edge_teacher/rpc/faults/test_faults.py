"""Things die and links break while questions are asked: over a real broker, between real processes.

Counted every time: nothing is lost, nothing answered twice, nothing corrupt, nothing beyond its deadline.
"""

from __future__ import annotations

import ast
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import edge_teacher
from edge_teacher.contract import frame
from edge_teacher.contract.limits import MIB
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.paho import PahoTransport
from edge_teacher.rpc.pair import connect_pair
from tests.brokers import Mosquitto
from tests.edge_teacher.rpc.faults.coordinator import BYTES
from tests.edge_teacher.rpc.faults.proxy import CuttingProxy
from tests.edge_teacher.rpc.wire import DEVICE, Ask, Said, noise

DEADLINE_S = 60


class Ground:
    """A broker, and the processes and connections of one test; all end with it."""

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self.folder = folder
        self.ends = ends
        self.executions = folder / "executions"
        self.executions.touch()
        self.broker: Mosquitto | None = None

    def start_broker(self, *lines: str) -> Mosquitto:
        self.broker = Mosquitto(self.folder, *lines).start()
        self.ends.callback(self.broker.kill)
        return self.broker

    def process(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", f"tests.edge_teacher.rpc.faults.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

        def end() -> None:
            process.kill()
            process.communicate()

        self.ends.callback(end)
        return process

    def device(self, port: int, **options: object) -> subprocess.Popen[bytes]:
        given = [f"{name}={value}" for name, value in options.items()]
        process = self.process("device", str(port), str(self.executions), *given)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    def caller(self, port: int, name: str = "ada", **options: object) -> Caller:
        pair = connect_pair(BrokerAddress(host="127.0.0.1", port=port), name)
        self.ends.callback(pair.close)
        settings: dict[str, object] = {"retry_s": 0.5, "tick_s": 0.05, **options}
        caller = Caller(pair.control, name, bulk=pair.bulk, **settings)  # type: ignore[arg-type]
        self.ends.callback(caller.close)
        return caller

    def executed(self) -> Counter[str]:
        """How often each question was executed, by its text."""
        return Counter(line.split()[1] for line in self.executions.read_text().splitlines())


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    with ExitStack() as ends:
        yield Ground(tmp_path, ends)


def ask(caller: Caller, text: str, count: int = 0) -> Future[frame.Payload]:
    body = Ask(text=text, bytes_back=count)
    return caller.submit(DEVICE, "echo", body, timeout_s=DEADLINE_S)


def check(future: Future[frame.Payload], text: str, count: int = 0) -> None:
    """It comes within its deadline, and is what was asked for."""
    said, tensors = frame.decode(future.result(DEADLINE_S + 5), Said)
    assert said.text == text
    if count:
        assert np.array_equal(tensors["noise"], noise(count))


def received(caller: Caller) -> int:
    return caller.wire[DEVICE]["echo"].received


def wait_until_received(caller: Caller, count: int, future: Future[frame.Payload]) -> None:
    end = time.monotonic() + DEADLINE_S
    while received(caller) < count and not future.done():
        assert time.monotonic() < end
        threading.Event().wait(0.001)


def test_the_broker_dies_at_twenty_moments_of_a_transfer(ground: Ground) -> None:
    broker = ground.start_broker()
    ground.device(broker.port)
    caller = ground.caller(broker.port)
    chance, count, in_time = random.Random(4), 8 * MIB, 0
    check(ask(caller, "first"), "first")
    for i in range(20):
        before = received(caller)
        future = ask(caller, f"q{i}", count)
        wait_until_received(caller, before + chance.randrange(1, 7 * MIB), future)
        in_time += not future.done()
        broker.kill()
        broker.start()
        check(future, f"q{i}", count)
    assert in_time >= 15  # it was in the middle of the transfer
    assert ground.executed() == Counter(["first", *(f"q{i}" for i in range(20))])


def test_the_device_dies_in_the_middle_of_an_answer(ground: Ground) -> None:
    broker = ground.start_broker()
    device = ground.device(broker.port)
    caller = ground.caller(broker.port)
    for i in range(3):
        before = received(caller)
        future = ask(caller, f"q{i}", 32 * MIB)
        wait_until_received(caller, before + 4 * MIB, future)
        assert not future.done()
        device.kill()
        device.wait()
        device = ground.device(broker.port)
        check(future, f"q{i}", 32 * MIB)
    # Its memory died with it: once by each process, and only one answer came of both.
    lines = ground.executions.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 6


def test_a_coordinator_is_killed_and_goes_on(ground: Ground) -> None:
    broker = ground.start_broker()
    ground.device(broker.port, slow=0.02)
    kept, count = ground.folder / "kept", 30
    kept.mkdir()
    arguments = (str(broker.port), str(kept), str(count))
    first = ground.process("coordinator", *arguments)
    end = time.monotonic() + DEADLINE_S
    while len(list(kept.glob("[0-9]*"))) < 5:
        assert time.monotonic() < end
        assert first.poll() is None
        threading.Event().wait(0.005)
    first.kill()
    first.wait()
    before = {path.name for path in kept.glob("[0-9]*") if path.name.isdigit()}
    assert len(before) < count
    second = ground.process("coordinator", *arguments)
    assert second.wait(DEADLINE_S) == 0
    for i in range(count):
        assert (kept / str(i)).read_bytes() == noise(BYTES).tobytes()
    executed = ground.executed()
    assert set(executed) == {str(i) for i in range(count)}
    assert all(executed[name] == 1 for name in before)
    # Four were outstanding when it died: only those were asked for a second time.
    assert sum(executed.values()) <= count + 4


def test_a_connection_that_drops_every_two_seconds_brings_64_mib(ground: Ground) -> None:
    broker = ground.start_broker()
    proxy = CuttingProxy(broker.port, bytes_per_s=16e6, cut_s=2)
    ground.ends.callback(proxy.close)
    ground.device(proxy.port)
    caller = ground.caller(proxy.port)
    future = ask(caller, "large", 64 * MIB)
    check(future, "large", 64 * MIB)
    assert proxy.cuts >= 2
    assert ground.executed() == Counter(["large"])
    assert received(caller) < 2 * 64 * MIB  # what had arrived did not travel again


def test_chunks_lost_doubled_held_back_cut_short_and_flipped(ground: Ground) -> None:
    broker = ground.start_broker()
    ground.device(broker.port, chaos=3)
    caller = ground.caller(broker.port, retry_s=0.2)
    futures = {f"q{i}": ask(caller, f"q{i}", 6 * MIB) for i in range(8)}
    for text, future in futures.items():
        check(future, text, 6 * MIB)
    assert ground.executed() == Counter(list(futures))


def test_a_broker_whose_queues_overflow(ground: Ground) -> None:
    broker = ground.start_broker(
        "allow_anonymous true", "max_inflight_messages 1", "max_queued_messages 3"
    )
    ground.device(broker.port)
    caller = ground.caller(broker.port, outstanding=200)
    futures = {f"q{i}": ask(caller, f"q{i}", 20_000) for i in range(200)}
    large = ask(caller, "large", 8 * MIB)
    for text, future in futures.items():
        check(future, text, 20_000)
    check(large, "large", 8 * MIB)
    assert ground.executed() == Counter([*futures, "large"])
    # The broker did drop some: more was sent than every request once.
    once = sum(len(frame.encode(Ask(text=text, bytes_back=20_000))) for text in futures)
    controls = 17 * 150  # at most one for each chunk of the large answer
    assert caller.wire[DEVICE]["echo"].sent > once + controls + 20 * once // len(futures)


@pytest.mark.parametrize("victim", [DEVICE, DEVICE + ":bulk", "ada", "ada:bulk"])
def test_another_client_takes_the_session_over(ground: Ground, victim: str) -> None:
    broker = ground.start_broker()
    ground.device(broker.port)
    caller = ground.caller(broker.port)
    future = ask(caller, "q", 32 * MIB)
    wait_until_received(caller, 4 * MIB, future)
    assert not future.done()
    thief = PahoTransport(broker.address, victim)
    thief.close()  # before the victim's own return would end it, and it the victim's again
    check(future, "q", 32 * MIB)
    assert ground.executed() == Counter(["q"])


def test_clocks_an_hour_apart(ground: Ground) -> None:
    broker = ground.start_broker()
    ground.device(broker.port, skew=-3600)
    caller = ground.caller(broker.port)
    future = caller.submit(DEVICE, "echo", Ask(text="q", bytes_back=3 * MIB), timeout_s=5)
    check(future, "q", 3 * MIB)


def test_no_wall_clock_is_read_by_the_protocol() -> None:
    """So that no skew can matter: durations travel, and each side counts them on its own monotonic clock."""
    root = Path(edge_teacher.__file__).parent
    for path in [*(root / "rpc").glob("*.py"), *(root / "contract").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("time", "time"), path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                assert "datetime" not in [getattr(node, "module", ""), *names], path


def test_a_thousand_queries_from_four_coordinators_at_once(ground: Ground) -> None:
    broker = ground.start_broker()
    ground.device(broker.port)
    names = ("ada", "bob", "cyd", "dee")
    callers = {name: ground.caller(broker.port, name) for name in names}
    futures: dict[str, Future[frame.Payload]] = {}
    lock = threading.Lock()

    def submit(name: str) -> None:
        for i in range(250):
            future = ask(callers[name], f"{name}{i}", 1000)
            with lock:
                futures[f"{name}{i}"] = future

    threads = [threading.Thread(target=submit, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(futures) == 1000
    for text, future in futures.items():
        check(future, text, 1000)
    executed = ground.executed()
    assert len(executed) == 1000
    assert set(executed.values()) == {1}
