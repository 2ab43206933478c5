"""Every kind of task learns, and several learn at once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from coordinator.amalgamation.task import joint_weights
from coordinator.config import Config
from coordinator.data import LabelledTask, SeveralTasks, TaskData
from coordinator.optimisation import joint_batches, joint_steps, shuffled_batches
from coordinator.settings import load_config
from coordinator.student import grad_cam, load_student, predict, scale_maps
from coordinator.training import TrainingResult, train
from edge_teacher.contract.errors import UsageError
from tests.coordinator.kinds_of_data import MAKE, task_data
from tests.coordinator.local_teacher import LocalTeacher, random_teacher
from tests.coordinator.test_training import Interrupted, Watch

CHANCE = {"single-label": 1 / 3, "multi-label": 0.45, "dense": 0.35}
"""Of the first metric, for an answer that does not look; rounded up."""
TASKS = {"tint": "single-label", "tags": "multi-label", "bands": "dense"}
DATA = SeveralTasks.of({name: task_data(kind) for name, kind in TASKS.items()}, {"tags": 2.0})


def config(**overrides: str) -> Config:
    base = {
        "threads": "1",
        "batch": "16",
        "shift": "1",
        "student.channels": "8",
        "selection.k": "2",
        "selection.every_rounds": "2",
        "aggregation.rounds": "4",
        "warmup.epochs": "2",
        "finetune.epochs": "2",
        "scratch.epochs": "0",
        "head.folds": "2",
    }
    return load_config(None, base | {k.replace("__", "."): v for k, v in overrides.items()}, {})


def teachers() -> dict[str, LocalTeacher]:
    return {f"t{i}": random_teacher(f"t{i}", i, 8 + 4 * i, 3 + i) for i in range(3)}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingResult, Path]:
    folder = tmp_path_factory.mktemp("several")
    return train(config(scratch__epochs="2"), DATA, teachers(), folder), folder


@pytest.mark.parametrize("kind", MAKE)
def test_labels_alone_teach(kind: str, tmp_path: Path) -> None:
    """The kind's loss, and nothing else: no head is fitted and nobody is asked for features."""
    alone = config(scratch__epochs="25", aggregation__rounds="1", finetune__epochs="0")
    found = train(alone, task_data(kind), teachers(), tmp_path).metrics["scratch"]["task"]
    first = next(iter(found.values()))
    assert first > CHANCE[kind] + 0.35


@pytest.mark.parametrize("kind", MAKE)
def test_soft_targets_alone_teach(kind: str, tmp_path: Path) -> None:
    """The task head on the teachers' features and the kind's soft loss; one epoch of labels before."""
    alone = config(
        warmup__epochs="1",
        finetune__epochs="0",
        aggregation__rounds="8",
        aggregation__hint_pooled="0",
    )
    result = train(alone, task_data(kind), teachers(), tmp_path)
    before = next(p for p in result.curve if p.stage == "warm-up").accuracy
    assert before is not None
    assert result.accuracy["fedsa"] > max(before, CHANCE[kind]) + 0.25


def test_several_do_about_as_well_as_each_alone(
    several: tuple[TrainingResult, Path], tmp_path: Path
) -> None:
    result, _ = several
    for name, kind in TASKS.items():
        alone = train(config(), task_data(kind), teachers(), tmp_path / name)
        first = next(iter(alone.metrics["fedsa"]["task"].values()))
        together = next(iter(result.metrics["fedsa"][name].values()))
        assert together > max(first - 0.1, CHANCE[kind] + 0.35), name
    assert result.accuracy["fedsa"] == pytest.approx(
        np.mean([next(iter(m.values())) for m in result.metrics["fedsa"].values()])
    )
    assert set(result.metrics["scratch"]) == set(TASKS)


def test_each_task_selects_by_where_its_own_head_looks(
    several: tuple[TrainingResult, Path],
) -> None:
    result, _ = several
    assert [(s.round, s.task) for s in result.selections] == [(r, t) for r in (0, 2) for t in TASKS]
    assert set(result.last_selections()) == set(TASKS)
    # Where the student looks depends on the head that is asked.
    images = DATA.tasks["tint"].probe.images
    maps = [grad_cam(result.student, images, name) for name in TASKS]
    assert np.array_equal(maps[0], result.student_maps[DATA.rows("tint")])
    assert np.abs(maps[0] - maps[1]).max() > 0.1
    assert np.abs(maps[0] - maps[2]).max() > 0.1


def test_two_tasks_on_the_same_images_score_the_teachers_differently(tmp_path: Path) -> None:
    one = task_data("single-label")
    tags = np.eye(3, dtype=np.uint8)[one.probe.labels][:, ::-1].copy()
    other = replace(one, probe=replace(one.probe, labels=tags, kind="multi-label"), test=None)
    data = SeveralTasks.of({"a": one, "b": other})
    once = config(aggregation__rounds="1", finetune__epochs="0", warmup__epochs="4")
    found = train(once, data, teachers(), tmp_path).last_selections()
    scores = [{t.teacher: t.similarity for t in found[name].teachers} for name in ("a", "b")]
    assert max(abs(scores[0][name] - scores[1][name]) for name in scores[0]) > 1e-4


def test_the_saliency_of_a_dense_head_is_that_of_its_largest_map(
    several: tuple[TrainingResult, Path],
) -> None:
    student = several[0].student
    images = DATA.tasks["bands"].probe.images[:6]
    with torch.no_grad():
        features = student.feature_map(torch.from_numpy(images))
        logits = student.classify(features, "bands")
        top = logits.sum((2, 3)).argmax(1)
        # Linear in every cell, and enlarging keeps the sum: alpha is the class's weights, up to a factor.
        weight = dict(student.head("bands").named_parameters())["cells.weight"][:, :, 0, 0]
        expected = scale_maps(torch.relu((weight[top][:, :, None, None] * features).sum(1)))
    assert np.abs(grad_cam(student, images, "bands") - expected.numpy()).max() < 1e-3


@pytest.mark.parametrize(("stage", "at"), [("warm-up", 2), ("round 2", 2), ("fine-tune", 3)])
def test_an_interrupted_run_of_several_ends_as_if_it_had_not_been(
    several: tuple[TrainingResult, Path], tmp_path: Path, stage: str, at: int
) -> None:
    settings = config(scratch__epochs="2")
    with pytest.raises(Interrupted):
        train(settings, DATA, teachers(), tmp_path, Watch(stage, at))
    resumed = train(settings, DATA, teachers(), tmp_path)
    whole = several[0].student.state_dict()
    assert all(torch.equal(whole[k], v) for k, v in resumed.student.state_dict().items())
    assert resumed.metrics == several[0].metrics
    assert resumed.selections == several[0].selections


def test_the_file_has_every_head(several: tuple[TrainingResult, Path]) -> None:
    result, folder = several
    stored = load_student(folder / "student.pt")
    for name, task in DATA.tasks.items():
        images = task.probe.images[:5]
        assert np.array_equal(predict(stored, images, name), predict(result.student, images, name))
        assert stored.spec.heads[name].classes == task.classes
    with pytest.raises(UsageError, match=r"heads for tint, tags, bands, and no task is named"):
        predict(stored, DATA.transfer[:2])
    with pytest.raises(UsageError, match="it has none for 'cats'"):
        predict(stored, DATA.transfer[:2], "cats")


def test_only_the_union_is_asked_and_maps_only_for_who_needs_them(tmp_path: Path) -> None:
    fleet = teachers()
    result = train(config(selection__k="1"), DATA, fleet, tmp_path)
    chosen = {name for s in result.selections for name in s.selection.weights}
    images = len(DATA.transfer) + len(DATA.probe_images)
    for name, teacher in fleet.items():
        assert teacher.asked["saliency"] == len(DATA.probe_images)
        # Everybody about the probe images, for the selection; of the transfer images only the chosen.
        of_probe = 2 * len(DATA.probe_images)
        assert teacher.asked["pooled"] == of_probe + (2 * images if name in chosen else 0)
        assert teacher.asked["features"] == (images if name in chosen else 0)
    fleet = teachers()
    train(config(), task_data("multi-label"), fleet, tmp_path / "tags")
    assert all(teacher.asked["features"] == 0 for teacher in fleet.values())


def test_the_oracle_judges_single_labels_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="oracle judges by accuracy, and the task tags is multi-"):
        train(config(selection__strategy="oracle"), DATA, teachers(), tmp_path)
    one = SeveralTasks.of({n: task_data("single-label") for n in ("a", "b")})
    once = config(selection__strategy="oracle", aggregation__rounds="1", finetune__epochs="0")
    found = train(once, one, teachers(), tmp_path / "single")
    assert all(s.selection.weights for s in found.selections)


def test_hints_weigh_by_the_tasks_and_their_selections() -> None:
    selected = {"tint": {"a": 1.0}, "tags": {"a": 0.25, "b": 0.75}, "bands": {"c": 1.0}}
    found = joint_weights(DATA, selected)
    assert found == pytest.approx({"a": (1 + 2 * 0.25) / 4, "b": 2 * 0.75 / 4, "c": 1 / 4})
    assert sum(found.values()) == pytest.approx(1)


def test_batches_of_several_sets_have_one_of_each_and_alone_are_the_plain_ones() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    alone = [index for (index,) in joint_batches([50], 16, generator())]
    plain = list(shuffled_batches(50, 16, generator()))
    assert all(torch.equal(a, b) for a, b in zip(alone, plain, strict=True))
    steps = list(joint_batches([50, 20, 7], 16, generator()))
    assert len(steps) == joint_steps([50, 20, 7], 16) == 3
    assert [len(batch) for batch in steps[0]] == [16, 16, 7]
    assert len(set(torch.cat([s[0] for s in steps]).tolist())) == 48  # none twice
    assert all(set(s[2].tolist()) == set(range(7)) for s in steps)
    assert not torch.equal(steps[0][2], steps[1][2])  # shuffled anew


def test_the_weight_of_a_task_is_its_share_in_the_loss(tmp_path: Path) -> None:
    """A task that weighs next to nothing hardly moves its head from where it began."""
    tasks = {name: task_data(TASKS[name]) for name in ("tint", "tags")}
    light = SeveralTasks.of(tasks, {"tags": 1e-6})
    once = config(aggregation__rounds="1", finetune__epochs="0")
    even, uneven = (
        train(once, data, teachers(), tmp_path / str(i)).student
        for i, data in enumerate((SeveralTasks.of(tasks), light))
    )
    bias = [dict(s.head("tags").named_parameters())["bias"].detach() for s in (even, uneven)]
    start = load_student_start(light)
    assert (bias[0] - start).abs().max() > 20 * (bias[1] - start).abs().max()


def load_student_start(data: SeveralTasks) -> torch.Tensor:
    """The bias of `tags` before any step."""
    from coordinator.student import HeadSpec, Student, StudentSpec

    torch.manual_seed(0)
    heads = {n: HeadSpec(t.probe.kind, t.classes) for n, t in data.tasks.items()}
    student = Student(StudentSpec.of_images(data.transfer, heads, 8))
    return dict(student.head("tags").named_parameters())["bias"].detach()


# ── the data object ──────────────────────────────────────────────────────────────────────────


def test_transfer_sets_are_joined_and_a_shared_one_is_there_once() -> None:
    one, other = task_data("single-label"), task_data("multi-label")
    assert len(SeveralTasks.of({"a": one, "b": other}).transfer) == 192
    same = replace(other, transfer=one.transfer.copy())
    assert len(SeveralTasks.of({"a": one, "b": same}).transfer) == 96
    data = SeveralTasks.of({"a": one, "b": other})
    assert data.rows("b") == slice(48, 96)
    assert np.array_equal(data.probe_images[data.rows("b")], other.probe.images)


def test_tasks_that_do_not_fit_together_are_said() -> None:
    one = task_data("single-label")
    with pytest.raises(UsageError, match="no task to learn"):
        SeveralTasks.of({})
    with pytest.raises(UsageError, match="transfer set has images of 24x24 pixels and another"):
        SeveralTasks.of({"a": one, "b": task_data("dense", size=24)})
    with pytest.raises(UsageError, match="probe set of b has images of 24x24"):
        SeveralTasks({"b": LabelledTask(MAKE["dense"](4, 0, 24))}, one.transfer)
    for weight in (0.0, math.inf, math.nan):
        with pytest.raises(
            UsageError, match=r"weight of the task a is .*; it must be a finite number"
        ):
            SeveralTasks.of({"a": one}, {"a": weight})
    with pytest.raises(UsageError, match="no usable id"):
        SeveralTasks.of({"a/b": one})
    bad: NDArray[np.int64] = one.probe.labels + 5
    with pytest.raises(UsageError, match="in the probe set of a runs from 5 to 7"):
        SeveralTasks.of({"a": TaskData(replace(one.probe, labels=bad), one.transfer)})
    other = replace(one.test, classes=("x", "y", "z")) if one.test else None
    with pytest.raises(UsageError, match="different classes: 'blue', 'green'"):
        SeveralTasks.of({"a": TaskData(one.probe, one.transfer, other)})


def test_another_weight_is_another_run(several: tuple[TrainingResult, Path]) -> None:
    _, folder = several
    even = SeveralTasks({n: replace(t, weight=1.0) for n, t in DATA.tasks.items()}, DATA.transfer)
    with pytest.raises(UsageError, match="other data"):
        train(config(scratch__epochs="2"), even, teachers(), folder)
