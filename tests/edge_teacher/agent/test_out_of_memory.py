"""A real agent, in a control group with little memory, asked for far more than fits: it is never killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_teacher.contract import frame
from edge_teacher.contract.errors import Busy
from edge_teacher.contract.frame import Payload
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.limits import MIB
from edge_teacher.contract.messages import (
    Answered,
    Card,
    FeaturesQuery,
    PutImages,
    Received,
    State,
    TapInfo,
    Telemetry,
)
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.pair import connect_pair
from tests.brokers import Mosquitto
from tests.edge_teacher.nets import TEACHER, teacher_answers, teacher_bundle
from tests.edge_teacher.rpc.wire import eventually

SIDE = 256
IMAGES = 64
"""Their feature maps have 12.6 MB as f32."""
COORDINATORS, EACH = 6, 6
MORE_MIB = 256
"""What the agent may have beside what it has when it has started."""


class Group:
    """A control group of version 1 or 2 that can be limited while processes are in it."""

    def __init__(self, folder: Path, version: int) -> None:
        self.folder = folder
        self._version = version

    def add(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def limit(self, limit: int) -> None:
        if self._version == 1:
            (self.folder / "memory.limit_in_bytes").write_text(str(limit))
        else:
            (self.folder / "memory.max").write_text(str(limit))
            with contextlib.suppress(OSError):
                (self.folder / "memory.swap.max").write_text("0")

    @property
    def killed(self) -> int:
        name = "memory.oom_control" if self._version == 1 else "memory.events"
        words = (self.folder / name).read_text().split()
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


@contextmanager
def control_group() -> Iterator[Group | None]:
    """None where this process may not make one: then only what the agent takes is looked at."""
    for base, version in (("/sys/fs/cgroup/memory", 1), ("/sys/fs/cgroup", 2)):
        folder = Path(base) / f"fedsa-test-{secrets.token_hex(4)}"
        probe = "memory.limit_in_bytes" if version == 1 else "memory.max"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / probe).exists():
                yield Group(folder, version)
                return
        finally:
            # It is empty a moment after its last process has ended.
            eventually(lambda f=folder: _removed(f))  # type: ignore[misc]
    yield None


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the agent is gone")


class Watch:
    """Hears the agent."""

    def __init__(self, mosquitto: Mosquitto, stack: ExitStack) -> None:
        self.born = threading.Event()
        self.cards: list[Card] = []
        self.refused = 0
        pair = connect_pair(mosquitto.address, "watch")
        stack.callback(pair.close)
        pair.control.subscribe("fedsa/v1/d1/state", self._state)
        pair.control.subscribe(
            "fedsa/v1/d1/card", lambda m: self.cards.append(frame.decode(m.payload, Card)[0])
        )
        pair.control.subscribe("fedsa/v1/d1/telemetry", self._telemetry)

    def _state(self, message: object) -> None:
        if frame.decode(message.payload, State)[0].online:  # type: ignore[attr-defined]
            self.born.set()

    def _telemetry(self, message: object) -> None:
        self.refused = frame.decode(message.payload, Telemetry)[0].refused  # type: ignore[attr-defined]


@pytest.mark.timeout(180)
def test_far_more_than_fits_is_answered_or_refused_and_never_kills(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    info = msgspec.structs.replace(
        TEACHER,
        input_size=(SIDE, SIDE),
        taps={"last": TapInfo(channels=3, height=SIDE // 2, width=SIDE // 2)},
        saliency_size=(SIDE // 2, SIDE // 2),
    )
    bundle = tmp_path / "teacher.fedsa"
    bundle.write_bytes(teacher_bundle(info))
    # Of a process like it, before it serves: the limit has to be there when it starts.
    limit = _resident_when_started(bundle, tmp_path, mosquitto) + MORE_MIB * MIB
    with ExitStack() as stack:
        group = stack.enter_context(control_group())
        watch = Watch(mosquitto, stack)
        agent = stack.enter_context(
            _agent(bundle, tmp_path, mosquitto, 0 if group else limit, group, limit)
        )
        assert watch.born.wait(30)
        eventually(lambda: bool(watch.cards))
        assert watch.cards[-1].limits.image_store_bytes < limit // 4
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), np.uint8)
        right = teacher_answers(images)[0]
        callers = []
        for i in range(COORDINATORS):
            pair = connect_pair(mosquitto.address, f"c{i}")
            stack.callback(pair.close)
            callers.append(Caller(pair.control, f"c{i}", bulk=pair.bulk))
            stack.callback(callers[-1].close)
        block = _put(callers[0], images)
        asked: list[Future[Payload]] = [
            caller.submit("d1", "features", FeaturesQuery(block=block, dtype="f32"), timeout_s=60)
            for _ in range(EACH)
            for caller in callers
        ]
        answered = 0
        for i, future in enumerate(asked):
            with contextlib.suppress(Busy):  # any other error is one of the test's
                _, tensors = callers[i % COORDINATORS].decode(future.result(90), Answered)
                assert np.allclose(tensors["features"], right, atol=1e-5)
                answered += 1
            asked[i] = Future()  # its answer is not kept
        assert agent.poll() is None
        assert peak_bytes(agent.pid) <= limit
        assert group is None or group.killed == 0
        assert answered
        # And it goes on answering: what was held for the others is given back.
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(Busy):
                query = FeaturesQuery(block=block, dtype="f32")
                _, tensors = callers[0].call("d1", "features", query, answer=Answered, timeout_s=30)
                assert np.allclose(tensors["features"], right, atol=1e-5)
                break
            assert time.monotonic() < deadline
        # 36 answers of 12.6 MB were wanted at once: some had to be told to come again.
        eventually(lambda: watch.refused > 0)


def _resident_when_started(bundle: Path, folder: Path, mosquitto: Mosquitto) -> int:
    with ExitStack() as stack:
        watch = Watch(mosquitto, stack)
        agent = stack.enter_context(_agent(bundle, folder, mosquitto, 0, None, 0))
        assert watch.born.wait(30)
        pages = int(Path(f"/proc/{agent.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _agent(
    bundle: Path, folder: Path, mosquitto: Mosquitto, memory: int, group: Group | None, limit: int
) -> Iterator[subprocess.Popen[bytes]]:
    def enter() -> None:
        if group is not None:
            group.add(os.getpid())

    if group is not None:
        group.limit(limit)
    command = [sys.executable, "-m", "tests.edge_teacher.agent.small_agent"]
    arguments = [str(mosquitto.port), str(bundle), str(folder / "state"), str(memory)]
    process = subprocess.Popen([*command, *arguments], preexec_fn=enter)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def _put(caller: Caller, images: np.ndarray) -> str:
    block, flat = image_block_id(images), images.reshape(-1)
    offset, deadline = 0, time.monotonic() + 60
    while offset < flat.size:
        request = PutImages(block=block, shape=images.shape, offset=offset)
        piece = {"data": flat[offset : offset + MIB]}
        try:
            received, _ = caller.call("d1", "put_images", request, piece, answer=Received)
        except Busy:  # it is still finding out what a step takes: "send it again later"
            assert time.monotonic() < deadline
            continue
        assert received.next_offset > offset
        offset = received.next_offset
    return block
