"""Everything on one machine: a broker, one agent process per teacher, and a task for them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator import processes
from coordinator.broker import Kind, available, local_broker
from coordinator.config import Config
from coordinator.connection import Connection, connect
from coordinator.data import read_task
from coordinator.fleet import Device
from coordinator.pipeline import TaskRun, Timings, run_task
from coordinator.report import Report
from coordinator.terminal import TerminalProgress, console
from edge_teacher.contract.errors import CheckFailed, UsageError
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


def demo_data(examples: Path) -> dict[str, str]:
    """Where the demo's task lies, as configuration keys."""
    archive = examples / "data" / "cifar10-mini.tar.xz"
    return {
        "data.probe": f"{archive}/probe",
        "data.transfer": f"{archive}/transfer",
        "data.test": f"{archive}/test",
    }


def run_demo(options: DemoOptions) -> Report:
    """Start everything, run the task, deploy, measure, end everything. Raises what fails."""
    bundles = sorted((options.examples / "teachers").glob("*.fedsa"))
    if not bundles:
        raise UsageError(
            f"there are no teacher bundles in {options.examples / 'teachers'}: run this from a clone "
            "of the repository, or name its examples with --examples"
        )
    data = options.config.data
    timings = Timings()
    folder = options.folder
    with timings.of("data"):
        task = read_task(Path(data.probe), Path(data.transfer), Path(data.test))
    folder.mkdir(parents=True)
    key = private_key_at(folder / "coordinator.key")
    kind = options.broker or available()
    if options.broker is None and kind == "iotcore":
        console.print("mosquitto is not on PATH: taking the broker embedded in iotcore instead")
    with local_broker(folder / "broker", kind=kind, port=options.port) as broker:
        console.print(f"Broker: {broker.name} at {broker.address}")
        with timings.of("start agents"), console.status("starting the agents"):
            agents = Agents(bundles, options.examples / "teachers", broker.address, folder)
        with agents.running(), connect(broker.address, broker=broker.name) as connection:
            with timings.of("start agents"):
                devices = agents.wait(connection)
            console.print(f"{len(devices)} teachers answer: {', '.join(d.name for d in devices)}")
            with TerminalProgress() as progress:
                return run_task(
                    TaskRun(
                        command="fedsa demo",
                        task=TASK,
                        config=options.config,
                        data=task,
                        folder=folder,
                        cache=folder / "answers",
                        key=key,
                        deploy=True,
                    ),
                    connection,
                    devices,
                    progress,
                    timings,
                )


class Agents:
    """One `edge-teacher run` process per bundle, each with a state folder and a log of its own."""

    def __init__(
        self, bundles: list[Path], teachers: Path, broker: BrokerAddress, folder: Path
    ) -> None:
        """`teachers` has the owner's public key beside the bundles; `folder` the coordinator's."""
        self._logs: dict[str, Path] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for bundle in bundles:
            device = bundle.stem.replace("teacher", "device")
            state = folder / "devices" / device
            state.mkdir(parents=True)
            self._logs[device] = state / "agent.log"
            command = [
                *(sys.executable, "-m", "edge_teacher", "run"),
                *("--device", device, "--broker", str(broker), "--bundle", str(bundle)),
                *("--owner-key", str(teachers / "owner.pub"), "--state", str(state)),
                *("--coordinator-key", str(folder / "coordinator.pub"), "--threads", "1"),
            ]
            one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._processes[device] = processes.start(
                command, self._logs[device], environment=one_thread
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ends them all afterwards, whatever happened."""
        try:
            yield
        finally:
            processes.stop(list(self._processes.values()))

    def wait(self, connection: Connection) -> list[Device]:
        """Until every agent has announced itself. Raises CheckFailed as soon as one has died."""
        end = time.monotonic() + START_S
        while True:
            online = connection.fleet.devices()
            if len(online) == len(self._processes):
                return online
            for device, process in self._processes.items():
                if process.poll() is not None:
                    words = processes.last_words(self._logs[device], lines=1)
                    raise CheckFailed(f"the agent of {device} ended at once: {words}")
            if time.monotonic() > end:
                return connection.fleet.wait(len(self._processes), 0)
            connection.fleet.wait_for_change(0.5)
