import copy
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from coordinator.amalgamation.aggregation import RoundPlan, average, run_round
from coordinator.amalgamation.answers import ask
from coordinator.amalgamation.task import AmalgamationTask, Losses, State
from coordinator.augmentation import Jitter
from coordinator.checkpoints import Record, Run
from coordinator.config import AggregationConfig, HeadConfig
from coordinator.data import SINGLE, LabelledImages, TaskData, as_several
from coordinator.loop import Loop
from coordinator.optimisation import OneCycle, stage_generator
from coordinator.progress import Silent
from coordinator.student import Student, StudentSpec
from tests.coordinator.local_teacher import coloured_images, random_teacher

CLASSES = ("a", "b", "c")
DATA = TaskData(
    LabelledImages(*coloured_images(12, 3, seed=0), CLASSES), coloured_images(36, 3, seed=1)[0]
)
TEACHERS = {"t.1": random_teacher("t.1", 1), "items": random_teacher("items", 2, 20, 3)}
ANSWERS = {
    name: ask(teacher, DATA.probe.images, DATA.transfer, flips=True, maps=True)
    for name, teacher in TEACHERS.items()
}
WEIGHTS = {"t.1": 0.75, "items": 0.25}


def make_task(
    weights: Mapping[str, float] = WEIGHTS,
    saved: Mapping[str, State] | None = None,
    agreement: Mapping[str, torch.Tensor] | None = None,
    **changes: object,
) -> AmalgamationTask:
    torch.manual_seed(0)
    student = Student(StudentSpec.of_images(DATA.transfer, CLASSES, 8))
    config = msgspec.structs.replace(AggregationConfig(hint_maps=1.0), **changes)
    return AmalgamationTask(
        student,
        as_several(DATA),
        ANSWERS,
        {SINGLE: weights},
        saved or {},
        config,
        HeadConfig(folds=2),
        seed=0,
        agreement=agreement,
    )


def loss(
    task: AmalgamationTask, weights: Mapping[str, float] = WEIGHTS, rows: list[int] | None = None
) -> Losses:
    """On all images, or on some."""
    index = torch.arange(len(task)) if rows is None else torch.tensor(rows)
    still = Jitter(torch.zeros(len(index), dtype=torch.bool), torch.zeros(len(index), 2).long())
    return task.loss(task.student, index, still, weights)[1]


def plan(number: int = 0, rounds: int = 8, epochs: int = 2) -> RoundPlan:
    cycle = OneCycle(0.1, rounds * epochs * 3)
    return RoundPlan(f"round {number}", number, epochs, batch=16, shift=1, cycle=cycle)


def run(
    task: AmalgamationTask,
    number: int = 0,
    place: RoundPlan | None = None,
    random: torch.Generator | None = None,
) -> list[float]:
    """The losses of one round."""
    random = random or stage_generator(0, f"round {number}")
    record = Record(config="", data="", teachers={})
    kept = Run(Path("not written"), record, {})
    loop = Loop(kept, Silent(), batch=16, weight_decay=1e-4, checkpoint_s=math.inf)
    run_round(task, place or plan(number), lambda lesson: loop.learn(lesson, random))
    return record.losses


def test_every_part_can_be_switched_off() -> None:
    whole = loss(make_task())
    assert whole.total == pytest.approx(
        (whole.hint_maps or 0) + (whole.hint_pooled or 0) + (whole.soft_targets or 0), rel=1e-5
    )
    for part in ("hint_maps", "hint_pooled", "soft_targets"):
        others = {p: 0.0 for p in ("hint_maps", "hint_pooled", "soft_targets") if p != part}
        only = loss(make_task(**others))
        assert only.total == pytest.approx(getattr(whole, part), rel=1e-5)
        assert all(getattr(only, p) is None for p in others)


def test_teachers_weigh_as_selected() -> None:
    task = make_task(soft_targets=0.0)
    alone = {name: loss(task, {name: 1.0}).total for name in WEIGHTS}
    assert loss(task).total == pytest.approx(
        sum(w * alone[name] for name, w in WEIGHTS.items()), rel=1e-4
    )


@pytest.mark.parametrize("row", [5, 40])
def test_a_hint_counts_on_an_image_what_the_agreement_says(row: int) -> None:
    """All of the mean of 1 on one image: of the transfer set, then of the probe set."""
    images = len(DATA.transfer) + len(DATA.probe)
    each = images * torch.eye(images)[row]
    one = {"t.1": 1.0}
    plain, agreeing = make_task(one), make_task(one, agreement={"t.1": each})
    for task in (plain, agreeing):
        task.student.eval()
        for net in task.trained(one).values():
            net.eval()
    alone = loss(plain, one, [row])
    assert loss(agreeing, one).hint_pooled == pytest.approx(alone.hint_pooled, rel=1e-4)
    assert alone.hint_pooled is not None
    counted = loss(agreeing, one, [row])
    assert counted.hint_pooled == pytest.approx(images * alone.hint_pooled, rel=1e-4)
    assert loss(agreeing, one, [row - 1]).hint_pooled == 0
    if row < len(DATA.transfer):
        assert alone.hint_maps is not None
        assert counted.hint_maps == pytest.approx(images * alone.hint_maps, rel=1e-4)
    assert loss(agreeing, one, [row - 1]).hint_maps == 0


def test_probe_images_keep_their_labels_as_targets() -> None:
    soft = make_task().taught[SINGLE].soft
    assert soft.shape == (48, 3)
    assert torch.equal(soft[36:].argmax(1), torch.from_numpy(DATA.probe.labels))
    assert (soft[36:].max(1).values == 1).all()
    assert soft[:36].sum(1).numpy() == pytest.approx(1)


@pytest.mark.parametrize("form", ["joint", "fedavg"])
def test_rounds_lower_every_part_of_the_loss(form: str) -> None:
    task = make_task(form=form)
    before = loss(task)
    for number in range(4):
        run(task, number)
    after = loss(task)
    for part in ("total", "hint_maps", "hint_pooled", "soft_targets"):
        assert getattr(after, part) < getattr(before, part), part


def test_a_round_repeats_and_its_rate_depends_on_its_place() -> None:
    first, again, later = make_task(), make_task(), make_task()
    assert run(first) == run(again)
    run(later, place=plan(5))
    states = [t.student.state_dict() for t in (first, again, later)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["heads.0.weight"], states[2]["heads.0.weight"])


def test_fedavg_is_the_average_of_copies_that_each_heard_one_teacher() -> None:
    task = make_task(form="fedavg")
    copies = {}
    generator = stage_generator(0, "round 0")
    for name in task.weights:
        alone = make_task(form="joint")
        alone.weights = {name: 1.0}
        run(alone, random=generator)
        copies[name] = alone.student.state_dict()
    run(task)
    expected = average(copies, WEIGHTS)
    found = task.student.state_dict()
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in expected.items())


def test_the_average_is_weighted_and_leaves_counters_whole() -> None:
    a = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    b = {"w": torch.tensor([5.0, 6.0]), "n": torch.tensor(3)}
    found = average({"a": a, "b": b}, {"a": 0.75, "b": 0.25})
    assert found["w"].tolist() == [2.0, 3.0]
    assert found["n"].dtype == torch.int64
    assert found["n"] == 3


def test_translators_go_on_from_their_saved_state() -> None:
    task = make_task()
    run(task)
    saved = {name: copy.deepcopy(net.state_dict()) for name, net in task.nets().items()}
    again = make_task({"items": 1.0}, saved=saved)
    for name, net in again.nets().items():
        if name in ("pooled items", "maps items"):
            assert all(torch.equal(v, saved[name][k]) for k, v in net.state_dict().items())
    kept = {n for n in again.nets() if n != "student"}
    assert kept == {"pooled items", "maps items", f"targets of {SINGLE} by items"}


def test_the_soft_targets_come_of_all_selected_teachers_and_can_be_off() -> None:
    both, one = make_task().taught[SINGLE], make_task({"items": 1.0}).taught[SINGLE]
    assert np.isfinite(both.score)
    assert not torch.equal(both.soft[:36], one.soft[:36])
    assert make_task(soft_targets=0.0).taught == {}


def test_a_refit_reads_the_student_and_a_run_that_goes_on_keeps_its_targets() -> None:
    # Hot, for these images are so easy that their targets would be all 0 and 1.
    task = make_task(temperature=50.0)
    key = f"targets of {SINGLE} by items, t.1"
    before = task.nets()[key].state_dict()["soft"].clone()
    run(task)
    task.refit()
    after = task.nets()[key].state_dict()["soft"].clone()
    assert not torch.equal(after[:36], before[:36])
    assert torch.equal(after[36:], before[36:])  # the labels stay
    assert (
        loss(task).soft_targets
        != loss(make_task(temperature=50.0, saved={key: {"soft": before}})).soft_targets
    )
    saved = {name: copy.deepcopy(net.state_dict()) for name, net in task.nets().items()}
    assert torch.equal(
        make_task(temperature=50.0, saved=saved).nets()[key].state_dict()["soft"], after
    )
