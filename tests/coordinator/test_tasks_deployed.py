"""A run of three kinds at once on a real agent: packaged, installed, asked, reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coordinator.connection import Connection
from coordinator.pipeline import TaskRun, Timings, run_task
from coordinator.progress import Silent
from coordinator.reading import read_answer
from coordinator.report import Report, read_report
from coordinator.rollout import install
from coordinator.rollout import predict as predict_on
from coordinator.student import load_student, measure, predict
from edge_teacher import bundle as bundles
from edge_teacher.bundle import StudentCard
from edge_teacher.contract.errors import TooLarge
from edge_teacher.contract.limits import Limits
from edge_teacher.rpc.address import parse_broker
from tests.coordinator.fleet_of_agents import World, world
from tests.coordinator.test_tasks import DATA, TASKS, config
from tests.edge_teacher.nets import COORDINATOR

# The teachers of these agents know two colours of whole images: few labels must do the rest.
SETTINGS = config(
    selection__k="1",
    selection__strategy="all",
    warmup__epochs="10",
    scratch__epochs="1",
    student__largest_drop="0.2",
    finetune__epochs="4",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Report, Path]]:
    folder = tmp_path_factory.mktemp("deployed")
    with world(folder, "d1", "d2") as here:
        connection = Connection(
            parse_broker("mqtt://localhost:1883"), "in memory", here.caller, here.fleet
        )
        task_run = TaskRun(
            command="fedsa train",
            task="everything",
            config=SETTINGS,
            data=DATA,
            folder=folder / "run",
            cache=folder / "answers",
            key=COORDINATOR,
            deploy=True,
        )
        (folder / "run").mkdir()
        devices = here.fleet.wait(2)
        report = run_task(task_run, connection, devices, Silent(), Timings())
        yield here, report, folder / "run"


def test_every_task_is_a_bundle_of_its_own(run: tuple[World, Report, Path]) -> None:
    _, _, folder = run
    for name, kind in TASKS.items():
        path = folder / f"student.{name}.fedsa"
        card = bundles.read(path, [COORDINATOR.public_key()]).card
        assert isinstance(card, StudentCard)
        assert (card.task, card.task_kind, card.classes) == (name, kind, DATA.tasks[name].classes)
        assert card.decision == ("each" if kind == "multi-label" else "top-1")
        assert 0.49 < card.canary_agreement <= 0.99
        assert (card.canary_agreement == 0.99) or kind != "single-label"


def test_devices_answer_as_the_student_does(run: tuple[World, Report, Path]) -> None:
    here, report, folder = run
    student = load_student(folder / "student.pt")
    for result in report.tasks:
        task = DATA.tasks[result.name]
        assert task.test is not None
        metric = measure(student, task.test, result.name)[result.metric]
        assert result.metrics["fedsa"][result.metric] == pytest.approx(metric)
        deployed = result.accuracy.deployed
        assert deployed is not None
        assert set(deployed) == {"d1", "d2"}
        assert deployed["d1"] == pytest.approx(result.accuracy.fedsa_int8, abs=1e-6)
        assert metric - deployed["d1"] < 0.2
        # Right more often than without looking; the exact figures are test_tasks' matter.
        assert deployed["d1"] > {"single-label": 0.6, "multi-label": 0.6, "dense": 0.4}[result.kind]
        images = task.test.images[:7]
        found = predict_on(here.caller, here.agents["d1"].card(), result.name, images)
        expected = predict(student, images, result.name)
        assert found.logits.shape == expected.shape
        assert (found.task_kind, found.version) == (task.probe.kind, result.version)
        spread = float(np.ptp(expected))
        assert np.abs(found.logits - expected).mean() < 0.15 * spread


def test_the_report_tells_of_each_task_and_of_all(run: tuple[World, Report, Path]) -> None:
    _, report, folder = run
    assert read_report(folder) == report
    assert [(t.name, t.kind) for t in report.tasks] == list(TASKS.items())
    assert [t.metric for t in report.tasks] == ["accuracy", "mean_average_precision", "mean_iou"]
    assert report.task.classes == tuple(c for t in report.tasks for c in t.classes)
    assert report.accuracy.fedsa_fp32 == pytest.approx(
        np.mean([t.accuracy.fedsa_fp32 or 0 for t in report.tasks])
    )
    assert report.metric == "mean over 3 tasks of accuracy or mean average precision or mean IoU"
    assert {t.id for t in report.teachers} == {"d1", "d2"}
    assert sum(t.weight for t in report.teachers) == pytest.approx(1)
    assert sum(report.rounds[0].weights.values()) == pytest.approx(1)
    assert all(len(t.teachers) == 2 and t.student is not None for t in report.tasks)
    page = (folder / "report.html").read_text()
    for words in ("mean IoU", "mean average precision", "bands", "tags", "multi-label, 3 classes"):
        assert words in page


def test_an_answer_that_would_be_too_large_is_refused(
    run: tuple[World, Report, Path], tmp_path: Path
) -> None:
    path = run[2] / "student.bands.fedsa"
    card = bundles.read(path, [COORDINATOR.public_key()]).card
    assert isinstance(card, StudentCard)
    images = DATA.tasks["bands"].probe.images
    with world(tmp_path, limits=Limits(max_answer_bytes=20_000)) as here:
        device = here.add("d9")
        install(here.caller, "d9", card, path.read_bytes())
        assert len(predict_on(here.caller, device, "bands", images[:6]).logits) == 6
        with pytest.raises(TooLarge, match="ask about fewer images"):
            predict_on(here.caller, device, "bands", images[:7])  # 7 x 3 x 16 x 16 x 4 bytes


def test_answers_in_words() -> None:
    said = read_answer(np.array([0.0, 2.0, 0.0], np.float32), "abc", "top-1")
    assert (said.named, said.probability) == ("b", pytest.approx(0.787, abs=1e-3))
    said = read_answer(np.array([1.0, -2.0, 3.0], np.float32), "abc", "each")
    assert said.named == "c, a"
    assert said.details["probabilities"]["b"] == pytest.approx(0.1192)
    nothing = read_answer(-np.ones(3, np.float32), "abc", "each")
    assert (nothing.named, nothing.probability) == (None, None)
    pixels = np.zeros((3, 2, 2), np.float32)
    pixels[2, 0] = 1
    pixels[1, 1, 0] = 1
    said = read_answer(pixels, "abc", "top-1")
    assert (said.named, said.probability) == ("c, a, b", 0.5)
    assert said.details == {"shares": {"c": 0.5, "a": 0.25, "b": 0.25}}
