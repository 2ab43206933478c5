import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch

from coordinator.checkpoints import Run
from coordinator.config import AggregationConfig, Config
from coordinator.data import LabelledImages, TaskData, as_several
from coordinator.results import curves, task_result
from coordinator.settings import load_config
from coordinator.student import load_student, predict
from coordinator.targets import refits_before
from coordinator.training import TrainingResult, train
from edge_teacher.contract.errors import CheckFailed, UsageError
from tests.coordinator.local_teacher import LocalTeacher, coloured_images, random_teacher

CLASSES = ("a", "b", "c")
DATA = TaskData(
    LabelledImages(*coloured_images(24, 3, seed=0), CLASSES),
    coloured_images(60, 3, seed=1)[0],
    LabelledImages(*coloured_images(60, 3, seed=2), CLASSES),
)
CONFIG = load_config(
    None,
    {
        "threads": "1",
        "batch": "16",
        "shift": "1",
        "student.channels": "8",
        "selection.k": "2",
        "selection.every_rounds": "2",
        "aggregation.rounds": "4",
        "aggregation.hint_maps": "0.5",
        "warmup.epochs": "2",
        "finetune.epochs": "2",
        "scratch.epochs": "3",
        "head.folds": "2",
    },
    {},
)


def teachers() -> dict[str, LocalTeacher]:
    return {f"t{i}": random_teacher(f"t{i}", i, 8 + 4 * i, 3 + i) for i in range(3)}


class Interrupted(BaseException):
    """Stands for Ctrl-C at a moment that the test chooses."""


class Watch:
    """Records what it is told; interrupts the run at the `at`-th step of `stage`, if given.

    The parts of a stage ("round 2, t1") are counted together.
    """

    def __init__(self, stage: str | None = None, at: int = 1) -> None:
        self.stage, self.left = stage, at
        self.stages: list[tuple[str, int]] = []
        self.begun: list[int] = []
        self.steps: list[int] = []
        self.said: list[str] = []

    def begin(self, stage: str, steps: int, done: int = 0) -> None:
        self.stages.append((stage, steps))
        self.begun.append(done)
        self.steps.append(done)

    def advance(self, loss: float | None = None, images: int = 0) -> None:
        self.steps[-1] += 1
        if self.stages[-1][0].split(", ")[0] == self.stage:
            self.left -= 1
            if not self.left:
                raise Interrupted

    def end(self) -> None:
        assert self.steps[-1] == self.stages[-1][1], self.stages[-1]

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def states(result: TrainingResult) -> dict[str, torch.Tensor]:
    return dict(result.student.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingResult, Watch, Path]:
    folder, watch = tmp_path_factory.mktemp("run"), Watch()
    return train(CONFIG, DATA, teachers(), folder, watch), watch, folder


def test_the_order_is_the_methods(whole: tuple[TrainingResult, Watch, Path]) -> None:
    result, watch, _ = whole
    named = [name for name, _ in watch.stages if name != "ask"]
    assert named == [
        *("scratch", "warm-up", "saliency", "features"),
        *("round 1", "round 2", "round 3", "round 4", "fine-tune"),
    ]
    assert [s.round for s in result.selections] == [0, 2]
    assert len(watch.said) >= 2


def test_the_result_has_what_a_report_needs(whole: tuple[TrainingResult, Watch, Path]) -> None:
    result, _, folder = whole
    assert set(result.accuracy) == {"scratch", "fedsa"}
    assert result.accuracy["fedsa"] > 0.5  # of three classes that a tint tells apart
    assert result.student_maps.shape[0] == 24
    assert {name: maps.shape[0] for name, maps in result.teacher_maps.items()} == dict.fromkeys(
        ("t0", "t1", "t2"), 24
    )
    for selection in result.selections:
        assert len(selection.selection.teachers) == 3
        assert len(selection.selection.weights) == 2
    stages = {point.stage for point in result.curve}
    assert {"scratch", "warm-up", "round 1", "round 4", "fine-tune"} <= stages
    assert all(p.accuracy is not None and np.isfinite(p.loss) for p in result.curve)
    assert {"scratch", "warm-up", "saliency", "ask", "aggregate", "fine-tune"} <= set(
        result.seconds
    )
    assert not result.student.training
    stored = load_student(folder / "student.pt")
    images = DATA.probe.images
    assert np.array_equal(predict(stored, images), predict(result.student, images))


def test_only_the_selected_are_asked_about_the_transfer_images(tmp_path: Path) -> None:
    fleet = teachers()
    result = train(CONFIG, DATA, fleet, tmp_path)
    chosen = {name for s in result.selections for name in s.selection.weights}
    for name, teacher in fleet.items():
        assert teacher.asked["saliency"] == 24
        # Of everybody the 24 probe images, for the selection; of the selected these and 60 transfer
        # images, once each: and the mirror images of all.
        assert teacher.asked["pooled"] == 2 * 24 + (2 * 84 if name in chosen else 0)
        assert teacher.asked["features"] == (60 if name in chosen else 0)


@pytest.mark.parametrize(
    ("stage", "at"),
    [("scratch", 2), ("warm-up", 1), ("round 2", 3), ("round 3", 1), ("fine-tune", 2)],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    whole: tuple[TrainingResult, Watch, Path], tmp_path: Path, stage: str, at: int
) -> None:
    with pytest.raises(Interrupted):
        train(CONFIG, DATA, teachers(), tmp_path, Watch(stage, at))
    watch = Watch()
    resumed = train(CONFIG, DATA, teachers(), tmp_path, watch)
    assert stage in [name for name, _ in watch.stages]
    assert ("scratch" in [name for name, _ in watch.stages]) == (stage == "scratch")
    expected = states(whole[0])
    assert all(torch.equal(expected[k], v) for k, v in states(resumed).items())
    assert resumed.selections == whole[0].selections
    assert resumed.curve == whole[0].curve
    assert resumed.accuracy == whole[0].accuracy


def often(form: Literal["joint", "fedavg"]) -> Config:
    """With a checkpoint after every step, and a round of two epochs."""
    aggregation = msgspec.structs.replace(CONFIG.aggregation, form=form, epochs=2)
    return msgspec.structs.replace(CONFIG, aggregation=aggregation, checkpoint_s=0.0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainingResult]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {
        "joint": train(often("joint"), DATA, teachers(), folder / "joint"),
        "fedavg": train(often("fedavg"), DATA, teachers(), folder / "fedavg"),
    }


@pytest.mark.parametrize(
    ("form", "stage", "at"),
    [
        ("joint", "scratch", 2),
        ("joint", "round 2", 5),
        ("joint", "round 3", 8),
        ("joint", "fine-tune", 2),
        ("fedavg", "round 1", 4),
        ("fedavg", "round 2", 17),
    ],
)
def test_a_run_goes_on_within_a_stage_at_the_step_where_it_was(
    uninterrupted: dict[str, TrainingResult],
    tmp_path: Path,
    form: Literal["joint", "fedavg"],
    stage: str,
    at: int,
) -> None:
    before, after = Watch(stage, at), Watch()
    with pytest.raises(Interrupted):
        train(often(form), DATA, teachers(), tmp_path, before)
    resumed = train(often(form), DATA, teachers(), tmp_path, after)
    name = before.stages[-1][0]
    begun = {stage: done for (stage, _), done in zip(after.stages, after.begun, strict=True)}
    # The step in which it was interrupted was not saved, and is the only one that is done again.
    assert begun[name] == before.steps[-1] - 1
    expected = uninterrupted[form]
    assert all(torch.equal(states(expected)[k], v) for k, v in states(resumed).items())
    assert resumed.curve == expected.curve
    assert resumed.selections == expected.selections


def test_how_often_it_is_saved_does_not_matter(
    uninterrupted: dict[str, TrainingResult], tmp_path: Path
) -> None:
    rarely = train(
        msgspec.structs.replace(often("joint"), checkpoint_s=1e9), DATA, teachers(), tmp_path
    )
    expected = states(uninterrupted["joint"])
    assert all(torch.equal(expected[k], v) for k, v in states(rarely).items())


def test_a_loss_that_is_not_finite_ends_the_run_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"the loss of warm-up is (nan|inf): .* lower rate"):
        train(variant(warmup__rate="1e30", warmup__epochs="40"), DATA, teachers(), tmp_path)


def test_a_finished_run_is_only_read(whole: tuple[TrainingResult, Watch, Path]) -> None:
    result, _, folder = whole
    watch = Watch()
    again = train(CONFIG, DATA, teachers(), folder, watch)
    assert [name for name, _ in watch.stages] == ["saliency", "features"]
    assert all(torch.equal(states(result)[k], v) for k, v in states(again).items())


def test_another_run_in_the_folder_is_not_mixed_in(
    whole: tuple[TrainingResult, Watch, Path],
) -> None:
    _, _, folder = whole
    changed = msgspec.structs.replace(CONFIG, seed=1)
    with pytest.raises(UsageError, match=r"other config \(seed is 0 there and 1 here\)"):
        train(changed, DATA, teachers(), folder)
    fewer = TaskData(DATA.probe, DATA.transfer[:50], DATA.test)
    with pytest.raises(UsageError, match="other data"):
        train(CONFIG, fewer, teachers(), folder)
    with pytest.raises(UsageError, match=r"other teachers \(new: new; --device chooses\)"):
        train(CONFIG, DATA, {**teachers(), "new": teachers()["t0"]}, folder)


def test_a_run_from_before_a_setting_was_there_had_its_default(
    whole: tuple[TrainingResult, Watch, Path], tmp_path: Path
) -> None:
    result, _, folder = whole
    shutil.copytree(folder, tmp_path / "old")
    known = {name: teacher.identity for name, teacher in teachers().items()}
    older = Run.open(tmp_path / "old", CONFIG, as_several(DATA), known)
    assert older.record.config.pop("finetune.average") == CONFIG.finetune.average
    older.record.config["aggregation.gone"] = 1
    older.save()
    with pytest.raises(UsageError, match=r"aggregation.gone is 1 there and None here"):
        train(CONFIG, DATA, teachers(), tmp_path / "old")
    del older.record.config["aggregation.gone"]
    older.save()
    again = train(CONFIG, DATA, teachers(), tmp_path / "old")
    assert all(torch.equal(states(result)[k], v) for k, v in states(again).items())


def test_heads_that_were_fitted_again_are_for_those_selected_later_too(tmp_path: Path) -> None:
    config = variant(
        selection__strategy="random",
        selection__every_rounds="1",
        aggregation__rounds="6",
        finetune__epochs="3",
    )
    config = msgspec.structs.replace(config, checkpoint_s=0.0)
    whole = train(config, DATA, teachers(), tmp_path / "whole")
    kept = Run.open(tmp_path / "whole", config, whole.data, {n: n for n in teachers()}).record
    later = {", ".join(sorted(s.selection.weights)) for s in whole.selections if s.round >= 3}
    assert len(later) > 1
    assert {key.split(" by ")[1] for key in kept.refitted} == later
    for stage in ("round 4", "round 5", "round 6", "fine-tune"):
        with pytest.raises(Interrupted):
            train(config, DATA, teachers(), tmp_path / "parts", Watch(stage, 2))
    resumed = train(config, DATA, teachers(), tmp_path / "parts")
    assert all(torch.equal(states(whole)[k], v) for k, v in states(resumed).items())


def test_a_run_that_is_gone_on_with_says_which_heads_it_has(
    whole: tuple[TrainingResult, Watch, Path], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train(CONFIG, DATA, teachers(), tmp_path, Watch("round 4", 2))
    watch = Watch()
    train(CONFIG, DATA, teachers(), tmp_path, watch)
    once, again = ([s for s in w.said if " head " in s] for w in (whole[1], watch))
    # The score of a head for the teachers alone would be another head's.
    assert (
        again == once[-1:] == ["The task head was fitted again, on the student's own features too"]
    )


def test_a_broken_checkpoint_is_said(
    whole: tuple[TrainingResult, Watch, Path], tmp_path: Path
) -> None:
    written = (whole[2] / "checkpoint.pt").read_bytes()
    for content in (b"half a file", written[: len(written) // 2], b""):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(UsageError, match="is not a checkpoint of this version: it is cut off"):
            train(CONFIG, DATA, teachers(), tmp_path)


def test_what_a_teacher_is_is_known_of_one_that_is_gone(tmp_path: Path) -> None:
    config = variant(selection__strategy="all")
    there = {name: name for name in teachers()}

    class Leaves(Watch):
        def begin(self, stage: str, steps: int, done: int = 0) -> None:
            super().begin(stage, steps, done)
            if stage == "fine-tune":
                del there["t1"]

    about = {name: f"the network of {name}" for name in teachers()}
    train(config, DATA, teachers(), tmp_path, Leaves(), lambda: there, about=about)
    left = {name: teacher for name, teacher in teachers().items() if name != "t1"}
    less = {name: about[name] for name in left}
    result = train(config, DATA, left, tmp_path, about=less)
    packaged: Any = SimpleNamespace(
        report=SimpleNamespace(files={"a": SimpleNamespace(accuracy=0.5)}),
        card=SimpleNamespace(graphs={"int8_cpu": "a"}, version=1),
    )
    (name,) = result.data.tasks
    found = task_result(name, "tints", result, packaged, deployed=None)
    assert {teacher.id: teacher.about for teacher in found.teachers} == about
    assert all(teacher.selected for teacher in found.teachers)


def test_the_test_set_decides_nothing(
    whole: tuple[TrainingResult, Watch, Path], tmp_path: Path
) -> None:
    blind = train(CONFIG, TaskData(DATA.probe, DATA.transfer), teachers(), tmp_path)
    assert blind.accuracy == {}
    assert all(p.accuracy is None for p in blind.curve)
    assert all(torch.equal(states(whole[0])[k], v) for k, v in states(blind).items())


def test_no_teacher_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no teacher to learn from"):
        train(CONFIG, DATA, {}, tmp_path)


def variant(**overrides: str) -> Config:
    keys = {key.replace("__", "."): text for key, text in overrides.items()}
    base = {
        "threads": "1",
        "batch": "16",
        "student.channels": "8",
        "warmup.epochs": "1",
        "finetune.epochs": "1",
        "scratch.epochs": "0",
        "aggregation.rounds": "1",
        "selection.k": "2",
    }
    return load_config(None, base | keys, {})


@pytest.mark.parametrize(
    "config",
    [
        variant(aggregation__form="fedavg"),
        variant(selection__strategy="sampled"),
        variant(selection__strategy="random"),
        variant(selection__strategy="all"),
        variant(aggregation__soft_targets="0"),
        variant(aggregation__hint_pooled="0", finetune__epochs="0"),
    ],
)
def test_every_switch_runs(config: Config, tmp_path: Path) -> None:
    result = train(config, DATA, teachers(), tmp_path)
    assert result.scratch is None
    assert set(result.accuracy) == {"fedsa"}
    assert np.isfinite(predict(result.student, DATA.transfer)).all()


@pytest.mark.parametrize(
    ("rounds", "refits", "before"),
    [(10, 1, {5}), (14, 1, {7}), (9, 2, {3, 6}), (1, 3, set()), (4, 0, set())],
)
def test_refits_are_spread_evenly(rounds: int, refits: int, before: set[int]) -> None:
    assert refits_before(AggregationConfig(rounds=rounds, refits=refits)) == before


def test_the_teachers_are_asked_about_every_view(tmp_path: Path) -> None:
    asked = {}
    for views in (0, 2):
        there = teachers()
        config = msgspec.structs.replace(
            CONFIG, aggregation=msgspec.structs.replace(CONFIG.aggregation, views=views, rounds=1)
        )
        train(config, DATA, there, tmp_path / str(views))
        asked[views] = max(t.asked["pooled"] for t in there.values())
    assert asked[2] - asked[0] == 2 * 2 * len(DATA.transfer)  # mirrored too


def test_the_learning_curve_counts_every_image_once(tmp_path: Path) -> None:
    result = train(CONFIG, DATA, teachers(), tmp_path)
    rounds = [point for point in curves(result)["fedsa"] if point.stage.startswith("round")]
    seen = [point.images_seen for point in rounds]
    each = len(DATA.transfer) + len(DATA.probe)
    assert [b - a for a, b in itertools.pairwise(seen)] == [each] * (len(seen) - 1)
    assert seen[0] == CONFIG.warmup.epochs * len(DATA.probe) + each


def test_the_oracle_needs_its_truth_before_anything_is_trained(tmp_path: Path) -> None:
    config = msgspec.structs.replace(
        CONFIG, selection=msgspec.structs.replace(CONFIG.selection, strategy="oracle")
    )
    with pytest.raises(UsageError, match=r"has none: give them \(data.test\)"):
        train(config, TaskData(DATA.probe, DATA.transfer), teachers(), tmp_path)
    assert not list(tmp_path.iterdir())
