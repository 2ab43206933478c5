"""Coordinators that ask one agent as fast as it answers, and the processes they ask it through."""

from __future__ import annotations

import json
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edge_teacher.contract import frame
from edge_teacher.contract.frame import Payload
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.messages import (
    Answered,
    FeaturesQuery,
    PutImages,
    Received,
    SaliencyQuery,
    State,
)
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.pair import connect_pair

DEVICE = "d1"
_TICKS = os.sysconf("SC_CLK_TCK")
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True)
class Rate:
    """Images in a time, and the CPU time of the process that computed them."""

    images: int
    seconds: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        return self.images / self.seconds

    @property
    def per_cpu_s(self) -> float:
        return self.images / self.cpu_s


def process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def process_rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def started(
    command: Sequence[str], core: int | None, **files: object
) -> Iterator[subprocess.Popen[str]]:
    """A process that may run on `core` alone; None: wherever it likes."""
    pinned = [] if core is None else ["taskset", "--cpu-list", str(core)]
    process = subprocess.Popen(
        [*pinned, *command],
        text=True,
        env={**os.environ, **QUIET},
        **files,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


class BareSession:
    """`benchmarks.agent_session`, asked over its standard input."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        self.batch = 1

    def rate(self, seconds: float, batch: int | None = None) -> Rate:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"batch": self.batch if batch is None else batch, "seconds": seconds}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return Rate(told["images"], told["seconds"], told["cpu_s"])

    def find_best(self, batches: Sequence[int], rounds: int = 3) -> None:
        """The best of several short rounds, in turn, by what each batch costs the processor."""
        rates = {
            batch: max(self.rate(0.2, batch).per_cpu_s for _ in range(rounds)) for batch in batches
        }
        self.batch = max(rates, key=lambda batch: rates[batch])


@contextmanager
def bare_session(bundle: Path, owner: Path, core: int | None) -> Iterator[BareSession]:
    command = [sys.executable, "-m", "benchmarks.agent_session", str(bundle), str(owner)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started(command, core, **pipes) as process:
        yield BareSession(process)


def agent_command(address: BrokerAddress, bundle: Path, owner: Path, state: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "edge_teacher", "run"),
        *("--device", DEVICE, "--broker", f"mqtt://{address.host}:{address.port}"),
        *("--bundle", str(bundle), "--owner-key", str(owner), "--state", str(state)),
    ]


class Births:
    """Waits for the agent to say that it is there."""

    def __init__(self, address: BrokerAddress, stack: ExitStack) -> None:
        pair = connect_pair(address, f"watch-{secrets.token_hex(4)}")
        stack.callback(pair.close)
        self._states: queue.Queue[State] = queue.Queue()
        pair.control.subscribe(
            f"fedsa/v1/{DEVICE}/state",
            lambda message: self._states.put(frame.decode(message.payload, State)[0]),
        )

    def wait(self) -> None:
        while not self._states.get(timeout=60).online:
            pass


class Coordinators:
    """So many of them, each with connections and blocks of its own."""

    def __init__(self, address: BrokerAddress, count: int, stack: ExitStack) -> None:
        self.callers = []
        for i in range(count):
            pair = connect_pair(address, f"ada-{i}-{secrets.token_hex(4)}")
            stack.callback(pair.close)
            caller = Caller(pair.control, f"ada-{i}", bulk=pair.bulk)
            stack.callback(caller.close)
            self.callers.append(caller)

    def upload(self, side: tuple[int, int], images: int, blocks: int) -> list[list[str]]:
        """Ids of blocks that the agent holds, for each of the coordinators; no two are alike."""
        return [
            [upload(caller, side, images, seed=number * 10_000 + block) for block in range(blocks)]
            for number, caller in enumerate(self.callers)
        ]

    def rate(
        self,
        blocks: list[list[str]],
        images: int,
        outstanding: int,
        seconds: float,
        pid: int,
        *,
        apart: bool = False,
    ) -> Rate:
        """What the agent of process `pid` answers: saliency and pooled features of every block, in turn.

        `apart`: as two queries. No two queries that are under way are about the same block, but for those
        two.
        """
        running = [
            _Asking(caller, mine, outstanding, apart)
            for caller, mine in zip(self.callers, blocks, strict=True)
        ]
        for asking in running:
            asking.begin()
        threading.Event().wait(0.3)  # until as many are under way as will be
        before = sum(asking.done for asking in running)
        cpu, began = process_cpu_s(pid), time.perf_counter()
        threading.Event().wait(seconds)
        done = sum(asking.done for asking in running) - before
        took, spent = time.perf_counter() - began, process_cpu_s(pid) - cpu
        for asking in running:
            asking.end()
        return Rate(done * images, took, spent)


class _Asking:
    """One coordinator: as soon as a block is answered, it asks about the next."""

    def __init__(self, caller: Caller, blocks: list[str], outstanding: int, apart: bool) -> None:
        self.done = 0
        self._caller = caller
        self._blocks = blocks
        self._outstanding = outstanding
        self._apart = apart
        self._next = 0
        self._under_way = 0
        self._ended = False
        self._lock = threading.Lock()
        self._empty = threading.Event()
        self._error: Exception | None = None

    def begin(self) -> None:
        for _ in range(self._outstanding):
            self._ask()

    def end(self) -> None:
        """Waits for what is under way. Raises what was answered instead of an answer."""
        self._ended = True
        if self._under_way and not self._empty.wait(60):
            raise RuntimeError("the agent does not answer any more")
        if self._error is not None:
            raise self._error

    def _ask(self) -> None:
        with self._lock:
            block = self._blocks[self._next % len(self._blocks)]
            self._next += 1
            self._under_way += 1
        queries: list[tuple[str, msgspec.Struct]] = [
            ("features", FeaturesQuery(block=block, form="pooled", saliency=not self._apart))
        ]
        if self._apart:
            queries.append(("saliency", SaliencyQuery(block=block)))
        left = [len(queries)]

        def answered(future: Future[Payload]) -> None:
            try:
                self._caller.decode(future.result(), Answered)
            except Exception as error:  # noqa: BLE001 - raised where the round ends
                self._error = error
                self._ended = True
            with self._lock:
                left[0] -= 1
                whole = not left[0]
                if whole:
                    self._under_way -= 1
                    self.done += 1
            if whole and not self._ended:
                self._ask()
            elif not self._under_way:
                self._empty.set()

        for method, query in queries:
            self._caller.submit(DEVICE, method, query, timeout_s=60).add_done_callback(answered)


def upload(caller: Caller, side: tuple[int, int], images: int, seed: int) -> str:
    block = np.random.default_rng(seed).integers(0, 256, (images, *side, 3), np.uint8)
    request = PutImages(block=image_block_id(block), shape=(images, *side, 3))
    flat = block.reshape(-1)
    # These blocks fit a message.
    received, _ = caller.call(DEVICE, "put_images", request, {"data": flat}, answer=Received)
    if received.next_offset != flat.size:
        raise RuntimeError("the agent did not take a block")
    return request.block
