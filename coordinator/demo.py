"""Everything on one machine: a broker, one agent process per teacher, and a task for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from coordinator import processes
from coordinator.broker import Kind, available, local_broker
from coordinator.config import Config
from coordinator.connection import Connection, connect
from coordinator.data import SeveralTasks, read_configured
from coordinator.fleet import Device
from coordinator.pipeline import TaskRun, Timings, run_task
from coordinator.report import Report
from coordinator.terminal import TerminalProgress, console, teachers_of
from coordinator.tracking import tracked
from edge_teacher.contract.errors import CheckFailed, FedsaError, Unreachable, UsageError
from edge_teacher.keys import private_key_at
from edge_teacher.rpc.address import BrokerAddress

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TASK = "cifar10-mini"
START_S = 60.0
"""Longest wait for the agents: eight Python processes on a loaded laptop."""


@dataclass(frozen=True)
class DemoOptions:
    config: Config
    examples: Path
    folder: Path
    broker: Kind | None = None
    port: int | None = None


def with_demo_data(config: Config, examples: Path) -> Config:
    """The demo's task wherever the settings name no data of their own."""
    archive = examples / "data" / "cifar10-mini.tar.xz"
    given = config.data
    if config.tasks:
        return config
    data = msgspec.structs.replace(
        given,
        probe=given.probe or f"{archive}/probe",
        transfer=given.transfer or f"{archive}/transfer",
        # A test set belongs to its probe set.
        test=given.test or ("" if given.probe else f"{archive}/test"),
    )
    return msgspec.structs.replace(config, data=data)


def run_demo(options: DemoOptions) -> Report:
    """Start everything, run the task, deploy, measure, end everything. Raises what fails."""
    bundles = sorted((options.examples / "teachers").glob("*.fedsa"))
    if not bundles:
        raise UsageError(
            f"there are no teacher bundles in {options.examples / 'teachers'}: run this from a clone "
            "of the repository, or name its examples with --examples"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("the demo is one process; `fedsa train` is what torchrun can start")
    timings = Timings()
    folder = options.folder
    with timings.of("data"):
        task = read_configured(options.config)
    folder.mkdir(parents=True)
    try:
        return _run_in(options, task, bundles, timings)
    except FedsaError:
        if not (folder / "devices").exists():  # nothing began
            shutil.rmtree(folder)
        raise


def _run_in(
    options: DemoOptions, task: SeveralTasks, bundles: list[Path], timings: Timings
) -> Report:
    folder = options.folder
    key = private_key_at(folder / "coordinator.key")
    kind = options.broker or available()
    if options.broker is None and kind == "iotcore":
        console.print("mosquitto is not on PATH: taking the broker embedded in iotcore instead")
    with (
        local_broker(folder / "broker", kind=kind, port=options.port) as broker,
        Agents(bundles, options.examples / "teachers", broker.address, folder) as agents,
        connect(broker.address, broker=broker.name) as connection,
        tracked(folder, f"demo-{folder.name}", options.config, console.print) as tracking,
        TerminalProgress() as progress,
    ):
        console.print(f"Broker: {broker.name} at {broker.address}")
        with timings.of("start agents"):
            devices = agents.wait(connection)
        console.print(f"{teachers_of(len(devices))} answer: {', '.join(d.name for d in devices)}")
        run = TaskRun(
            command="fedsa demo",
            task=TASK,
            config=options.config,
            data=task,
            folder=folder,
            cache=folder / "answers",
            key=key,
            deploy=True,
            tracking=tracking,
        )
        return run_task(run, connection, devices, progress, timings)


class Agents:
    """One `edge-teacher run` process per bundle, while this is entered."""

    def __init__(
        self, bundles: list[Path], teachers: Path, broker: BrokerAddress, folder: Path
    ) -> None:
        """`teachers` has the owner's public key beside the bundles; `folder` the coordinator's."""
        self._bundles = {b.stem.replace("teacher", "device"): b for b in bundles}
        self._teachers = teachers
        self._broker = broker
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Agents:
        try:
            for device, bundle in self._bundles.items():
                self._processes[device] = self._start(device, bundle)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop()

    def wait(self, connection: Connection) -> list[Device]:
        """Until every agent has announced itself. Raises CheckFailed as soon as one has died."""
        end = time.monotonic() + START_S
        while True:
            try:
                return connection.fleet.wait(names=list(self._processes), timeout_s=1)
            except Unreachable:
                for device, process in self._processes.items():
                    if process.poll() is not None:
                        words = processes.last_words(self._log(device), lines=1)
                        raise CheckFailed(f"the agent of {device} ended at once: {words}") from None
                if time.monotonic() > end:
                    raise

    def _start(self, device: str, bundle: Path) -> subprocess.Popen[bytes]:
        state = self._log(device).parent
        state.mkdir(parents=True)
        command = [
            *(sys.executable, "-m", "edge_teacher", "run"),
            *("--device", device, "--broker", str(self._broker), "--bundle", str(bundle)),
            *("--owner-key", str(self._teachers / "owner.pub"), "--state", str(state)),
            *("--coordinator-key", str(self._folder / "coordinator.pub"), "--threads", "1"),
        ]
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return processes.start(command, self._log(device), environment=one_thread)

    def _log(self, device: str) -> Path:
        return self._folder / "devices" / device / "agent.log"

    def _stop(self) -> None:
        processes.stop(list(self._processes.values()))
