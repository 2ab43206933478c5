"""Real agents, each a process, on a real broker: remembered, killed, stopped and back again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from coordinator.config import Config
from coordinator.connection import Connection, connect
from coordinator.demo import Agents
from coordinator.fleet import Device
from coordinator.pipeline import TaskRun, Timings, run_task
from coordinator.report import HTML, Report, read_report
from coordinator.student import load_student
from edge_teacher.contract.errors import CheckFailed
from edge_teacher.keys import private_key_at
from tests.brokers import Mosquitto
from tests.coordinator.test_losses import EVERYBODY, changed
from tests.coordinator.test_training import DATA, Watch
from tests.examples import three_teachers

CONFIG = changed("student", EVERYBODY, largest_drop=1.0)


class At(Watch):
    """Does something when a stage begins, once."""

    def __init__(self, stage: str, do: Callable[[], None]) -> None:
        super().__init__()
        self.when, self.do, self.done = stage, do, False

    def begin(self, stage: str, steps: int, done: int = 0) -> None:
        super().begin(stage, steps, done)
        if stage == self.when and not self.done:
            self.done = True
            self.do()

    def advance(self, loss: float | None = None, images: int = 0) -> None:
        if self.steps:
            self.steps[-1] += 1

    def end(self) -> None:
        pass


@dataclass
class Site:
    """Three agents on a broker."""

    folder: Path
    broker: Mosquitto
    agents: Agents

    @contextmanager
    def connected(self) -> Iterator[tuple[Connection, list[Device]]]:
        with connect(self.broker.address) as connection:
            yield connection, connection.fleet.wait(3, timeout_s=60)

    def run(
        self, name: str, config: Config, progress: Watch, *, deploy: bool = False
    ) -> tuple[Report, dict[str, set[str]]]:
        """The report, and who was asked by which methods."""
        with self.connected() as (connection, devices):
            run = TaskRun(
                command="test",
                task="tints",
                config=config,
                data=DATA,
                folder=self.folder / name,
                cache=self.folder / "answers",
                key=private_key_at(self.folder / "coordinator.key"),
                deploy=deploy,
            )
            run.folder.mkdir(exist_ok=True)
            report = run_task(run, connection, devices, progress, Timings())
            return report, {d: set(methods) for d, methods in connection.caller.wire.items()}

    def signal(self, device: str, number: int) -> None:
        process = self.agents._processes[device]
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            process.wait(10)


@pytest.fixture
def site(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Site]:
    teachers = three_teachers(tmp_path) / "teachers"
    private_key_at(tmp_path / "coordinator.key")
    with ExitStack() as stack:
        bundles = sorted(teachers.glob("*.fedsa"))
        agents = Agents(bundles, teachers, mosquitto.address, tmp_path)
        with connect(mosquitto.address) as connection:
            stack.enter_context(agents)
            agents.wait(connection)
        yield Site(tmp_path, mosquitto, agents)


@pytest.mark.timeout(200)
def test_a_second_run_asks_nothing_at_all_and_ends_the_same(site: Site) -> None:
    _, asked = site.run("first", CONFIG, At("", lambda: None))
    assert asked.keys() == {"device-a", "device-b", "device-c"}
    assert all(methods >= {"put_images", "saliency", "features"} for methods in asked.values())
    _, again = site.run("second", CONFIG, At("", lambda: None))
    assert again == {}
    nets = [load_student(site.folder / run / "student.pt") for run in ("first", "second")]
    first, second = (net.state_dict() for net in nets)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("stage", ["warm-up", "ask", "round 2"])
def test_a_third_of_the_agents_is_killed_and_the_run_ends_and_names_them(
    site: Site, stage: str
) -> None:
    watch = At(stage, lambda: site.signal("device-b", signal.SIGKILL))
    report, _ = site.run("killed", CONFIG, watch, deploy=True)
    (lost,) = report.lost
    assert lost.teacher == "device-b"
    chosen = {t.id for t in report.teachers if t.selected}
    early = stage in ("warm-up", "ask")
    assert chosen == {"device-a", "device-c"} | (set() if early else {"device-b"})
    assert (
        lost.stage
        == {
            "warm-up": "saliency",
            "ask": "features before round 1",
            "round 2": "end",
            "fine-tune": "end",
        }[stage]
    )
    assert lost.reselected == (stage == "ask")
    assert (lost.waited_s > 5) == early
    assert report.accuracy.deployed is not None
    assert report.accuracy.deployed.keys() == {"device-a", "device-c"}
    assert read_report(site.folder / "killed").lost == report.lost
    page = (site.folder / "killed" / HTML).read_text()
    assert "Set aside" in page
    assert page.count("device-b, at ") == 1


@pytest.mark.timeout(200)
def test_one_that_hangs_is_given_up_by_the_patience_and_asked_again_when_it_goes_on(
    site: Site,
) -> None:
    class Stops(At):
        def begin(self, stage: str, steps: int, done: int = 0) -> None:
            super().begin(stage, steps, done)
            if stage == "round 2":
                site.signal("device-b", signal.SIGCONT)

    site.signal("device-b", signal.SIGSTOP)
    config = changed("devices", CONFIG, patience_s=3.0)
    report, _ = site.run("stopped", config, Stops("", lambda: None))
    (lost,) = report.lost
    assert lost.teacher == "device-b"
    assert 2 < lost.waited_s < 30
    assert "did not answer" in lost.why
    assert lost.back == "saliency before round 3"
    assert [len(r.weights) for r in report.rounds] == [2, 3]


@pytest.mark.timeout(200)
def test_all_killed_is_one_sentence_and_the_run_can_be_gone_on_with(site: Site) -> None:
    def kill() -> None:
        for device in ("device-a", "device-b", "device-c"):
            site.signal(device, signal.SIGKILL)

    with pytest.raises(CheckFailed) as ended:
        site.run("all", CONFIG, At("ask", kill))
    for words in ("of 3 teachers 0", "device-a", "device-b", "device-c", "can be gone on with"):
        assert words in str(ended.value)
    assert (site.folder / "all" / "checkpoint.pt").exists()
