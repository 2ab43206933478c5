"""Options of the method that are off by default: each changes what is learnt, and none loses work."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from coordinator.adaptation import Adaptation, hold_out
from coordinator.adapted import Adapted, in_words
from coordinator.checkpoints import AGREEMENT
from coordinator.config import Config, FinetuneConfig
from coordinator.data import LabelledImages, SeveralTasks, TaskData, as_several
from coordinator.ranks import ALONE
from coordinator.settings import load_config
from coordinator.student import Student, StudentSpec, measure, predict
from coordinator.training import TrainingResult, train
from edge_teacher.contract.errors import UsageError
from tests.coordinator.local_teacher import LocalTeacher, coloured_images
from tests.coordinator.test_training import (
    CLASSES,
    DATA,
    Interrupted,
    Watch,
    states,
    teachers,
    variant,
)

QUICK = {
    "aggregation__rounds": "3",
    "aggregation__hint_maps": "0.5",
    "selection__every_rounds": "2",
    "finetune__epochs": "4",
}
LEARNT = variant(**QUICK, aggregation__weights="learnt")
LEARNT_APART = variant(**QUICK, aggregation__weights="learnt", aggregation__form="fedavg")
AGREEING = variant(**QUICK, aggregation__agreement="true", selection__strategy="random")
PLAIN = variant(**QUICK, selection__strategy="random")
AVERAGED = variant(**QUICK, selection__strategy="random", finetune__average="0.5")
KEPT = variant(**QUICK, finetune__average="0.5", finetune__held_out="0.25")
OPTIONS = {"learnt": LEARNT, "learnt apart": LEARNT_APART, "agreeing": AGREEING, "kept": KEPT}


def saved_often(config: Config) -> Config:
    return msgspec.structs.replace(config, checkpoint_s=0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainingResult]:
    return {
        name: train(config, DATA, teachers(), tmp_path_factory.mktemp("whole"))
        for name, config in OPTIONS.items()
    }


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("stage", "at"), [("round 2", 3), ("round 3", 2), ("fine-tune", 3)])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    whole: dict[str, TrainingResult], tmp_path: Path, name: str, stage: str, at: int
) -> None:
    config = saved_often(OPTIONS[name])
    with pytest.raises(Interrupted):
        train(config, DATA, teachers(), tmp_path, Watch(stage, at))
    resumed, expected = train(config, DATA, teachers(), tmp_path), whole[name]
    assert all(torch.equal(states(expected)[k], v) for k, v in states(resumed).items())
    assert resumed.curve == expected.curve
    assert resumed.learnt == expected.learnt
    assert resumed.adapted == expected.adapted


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_only_needed_on_the_way_is_not_kept(
    whole: dict[str, TrainingResult], tmp_path: Path, name: str
) -> None:
    train(OPTIONS[name], DATA, teachers(), tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    kept = [key for key in state["nets"] if key.startswith(("copy ", "agreement of "))]
    # Of the last selection.
    assert len(kept) == (2 if name == "agreeing" else 0)


@pytest.mark.parametrize("name", ["learnt", "learnt apart"])
def test_learnt_weights_are_shares_that_are_no_longer_the_selections(
    whole: dict[str, TrainingResult], name: str
) -> None:
    result = whole[name]
    chosen = result.selections[-1].selection.weights
    assert result.learnt.keys() == chosen.keys()
    assert sum(result.learnt.values()) == pytest.approx(1)
    assert all(abs(result.learnt[teacher] - w) > 1e-3 for teacher, w in chosen.items())


def test_without_the_option_no_weights_are_learnt(whole: dict[str, TrainingResult]) -> None:
    assert whole["agreeing"].learnt == {}
    assert whole["agreeing"].adapted is None


def test_agreement_changes_what_is_learnt_and_averaging_what_is_kept(
    whole: dict[str, TrainingResult], tmp_path: Path
) -> None:
    plain, averaged = (
        train(config, DATA, teachers(), tmp_path / name)
        for name, config in (("plain", PLAIN), ("averaged", AVERAGED))
    )
    agreeing = whole["agreeing"]
    assert plain.selections[0] == agreeing.selections[0]
    key = "heads.0.weight"
    assert not torch.equal(states(agreeing)[key], states(plain)[key])
    # A step an epoch, of which there are four.
    assert averaged.adapted == Adapted(averaged=2, epoch=4, epochs=4)
    assert not torch.equal(states(averaged)[key], states(plain)[key])


def test_those_selected_are_asked_where_they_look_once(tmp_path: Path) -> None:
    fleet = teachers()
    result = train(AGREEING, DATA, fleet, tmp_path)
    chosen = {name for s in result.selections for name in s.selection.weights}
    assert len(chosen) == 3
    for teacher in fleet.values():
        assert teacher.asked["saliency"] == 24 + 84


def test_a_selection_by_what_teachers_see_where_they_look(tmp_path: Path) -> None:
    fleet = teachers()
    config = variant(**QUICK, selection__strategy="logme")
    result = train(config, DATA, fleet, tmp_path)
    assert {s.selection.strategy for s in result.selections} == {"logme"}
    for name, teacher in fleet.items():
        assert teacher.asked["saliency"] == teacher.asked["attended"] == 24
        # The plain features are for the lessons only.
        selected = any(name in s.selection.weights for s in result.selections)
        assert teacher.asked["pooled"] == (2 * 84 if selected else 0)


def test_held_out_labels_are_learnt_from_by_no_stage(tmp_path: Path) -> None:
    """Up to the fine-tuning the student is the one that never had those images."""
    learnt, held = hold_out(as_several(DATA), 0.25, KEPT.seed)
    assert held is not None
    less = msgspec.structs.replace(KEPT, finetune=FinetuneConfig(epochs=4))
    seen = []
    for name, config, data in (("out", KEPT, DATA), ("never", less, learnt)):
        with pytest.raises(Interrupted):
            train(config, data, teachers(), tmp_path / name, Watch("fine-tune", 1))
        state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        seen.append(state["nets"]["student"])
    assert all(torch.equal(seen[0][key], value) for key, value in seen[1].items())


def test_the_best_epoch_by_held_out_labels_is_kept(
    whole: dict[str, TrainingResult], tmp_path: Path
) -> None:
    result = whole["kept"]
    found = result.adapted
    assert found is not None
    assert (found.held_out, found.epochs, len(found.scores)) == (6, 4, 5)
    assert found.scores[found.epoch] == max(found.scores)
    # The average is over the last half of four epochs of one step.
    assert found.averaged == max(found.epoch - 2, 0)
    assert found.metric == "accuracy"
    _, held = hold_out(result.data, 0.25, KEPT.seed)
    assert held is not None
    (task,) = held.tasks.values()
    assert task.test is not None
    assert measure(result.student, task.test)["accuracy"] == found.scores[found.epoch]


def test_a_fine_tuning_that_gets_no_better_is_stopped(tmp_path: Path) -> None:
    # A rate at which it forgets: the fresh heads, fitted to features as they were, are best.
    config = variant(
        **QUICK | {"finetune__epochs": "30", "finetune__rate": "0.2"},
        finetune__held_out="0.5",
        finetune__patience="2",
    )
    watch = Early()
    found = train(config, DATA, teachers(), tmp_path, watch).adapted
    assert found is not None
    assert found.epochs == found.epoch + 2 < 30
    assert len(found.scores) == found.epochs + 1
    assert any(sentence == f"The fine-tuning {in_words(found)}" for sentence in watch.said)


class Early(Watch):
    """Of a stage that may end before its last step."""

    def end(self) -> None:
        pass


def test_holding_out_keeps_the_shares_of_the_classes_and_repeats() -> None:
    labels = np.repeat(np.arange(3), (20, 10, 1))
    images = coloured_images(31, 3, seed=0)[0]
    data = as_several(TaskData(LabelledImages(images, labels, CLASSES), images))
    learnt, held = hold_out(data, 0.2, seed=3)
    assert held is not None
    ((kept,), (out,)) = learnt.tasks.values(), held.tasks.values()
    assert out.test is not None
    assert np.bincount(out.test.labels, minlength=3).tolist() == [4, 2, 0]
    assert np.bincount(kept.probe.labels, minlength=3).tolist() == [16, 8, 1]
    every = [image.tobytes() for image in (*kept.probe.images, *out.test.images)]
    assert sorted(every) == sorted(image.tobytes() for image in images)
    (again,) = hold_out(data, 0.2, seed=3)[0].tasks.values()
    assert np.array_equal(again.probe.images, kept.probe.images)
    assert hold_out(data, 0.0, seed=3) == (data, None)


def test_too_few_labels_to_hold_one_out_is_said() -> None:
    images, labels = coloured_images(3, 3, seed=0)
    data = as_several(TaskData(LabelledImages(images, labels, CLASSES), images))
    with pytest.raises(UsageError, match=r"finetune.held_out is 0.2, and no class .* set it to 0"):
        hold_out(data, 0.2, seed=0)


def test_averaged_weights_have_statistics_of_their_own() -> None:
    """The mean of all steps' weights; batch norm as training gathers it with these weights."""
    torch.manual_seed(0)
    student = Student(StudentSpec.of_images(DATA.transfer, CLASSES, 8))
    images = torch.from_numpy(DATA.transfer)
    config = FinetuneConfig(epochs=2, average=0.5)
    adaptation = Adaptation(student, config, images, None, steps=4, ranks=ALONE)
    key = "heads.0.weight"
    weights = []
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        adaptation.stepped(step)
        if step % 2 == 0:
            assert not adaptation.ended(step // 2)
        weights.append(student.state_dict()[key].clone())
    assert adaptation.finish() == Adapted(averaged=2, epoch=2, epochs=2)
    assert torch.allclose(student.state_dict()[key], (weights[2] + weights[3]) / 2, atol=1e-6)
    norms = [m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    kept = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the next batch alone
    student.train()
    student.feature_map(images)
    again = [norm.running_mean for norm in norms if norm.running_mean is not None]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("images", [257, 513])
def test_a_batch_that_statistics_are_gathered_from_is_never_a_short_one(images: int) -> None:
    """The last image is unlike the others, and counts as one of them; not as a whole batch."""
    tinted = coloured_images(images, 3, seed=0)[0]
    tinted[-1] //= 8
    torch.manual_seed(0)
    student = Student(StudentSpec.of_images(tinted, CLASSES, 8))
    config = FinetuneConfig(epochs=1, average=1.0)
    adaptation = Adaptation(student, config, torch.from_numpy(tinted), None, steps=1, ranks=ALONE)
    adaptation.stepped(1)
    adaptation.finish()
    norm = next(m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert norm.running_mean is not None
    kept = norm.running_mean.clone()
    norm.momentum = 1.0
    student.train()
    student.feature_map(torch.from_numpy(tinted))
    assert norm.running_var is not None
    off = (kept - norm.running_mean).abs() / norm.running_var.sqrt()
    assert float(off.max()) < 0.01


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            {
                "aggregation.weights": "learnt",
                "aggregation.hint_pooled": "0",
            },
            "weights are to be learnt of hints",
        ),
        (
            {"aggregation.agreement": "true", "aggregation.hint_pooled": "0"},
            "agreement is about hints",
        ),
        ({"finetune.patience": "2"}, "held_out is 0"),
        ({"finetune.average": "0.5", "finetune.epochs": "0"}, "epochs is 0"),
        ({"finetune.held_out": "0.9"}, "finetune.held_out"),
        ({"aggregation.weights": "equal"}, "aggregation.weights"),
    ],
)
def test_settings_that_make_no_sense_are_said(overrides: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_config(None, overrides, {})


@pytest.mark.parametrize(
    ("adapted", "says"),
    [
        (
            Adapted(averaged=5, epoch=4, epochs=4),
            "ended with the mean weights of 5 steps.",
        ),
        (
            Adapted(held_out=10, epoch=0, epochs=2, scores=(0.5, 0.4, 0.3), metric="mean IoU"),
            "ended with the weights it had before its first epoch: by mean IoU, 50.0% on 10 held-out labels, "
            "against 30.0% after epoch 2, its last.",
        ),
        (
            Adapted(
                averaged=1,
                held_out=10,
                epoch=2,
                epochs=2,
                scores=(0.5, 0.4, 0.6),
                metric="the mean over 2 tasks of accuracy",
            ),
            "ended with the mean weights of 1 step it had after epoch 2: "
            "by the mean over 2 tasks of accuracy, 60.0% on 10 held-out labels.",
        ),
    ],
)
def test_what_was_kept_in_words(adapted: Adapted, says: str) -> None:
    assert in_words(adapted) == says


def two_tasks() -> SeveralTasks:
    images, labels = coloured_images(24, 2, seed=5)
    tints = TaskData(LabelledImages(images, labels, ("a", "b")), DATA.transfer)
    return SeveralTasks.of({"three": DATA, "two": tints}, {"two": 0.5})


def test_one_that_is_selected_again_for_other_tasks_is_compared_again(tmp_path: Path) -> None:
    """Each of two teachers for a task; when one is gone the other is for both."""
    config = saved_often(
        variant(
            **QUICK,
            seed="1",
            selection__k="1",
            selection__strategy="random",
            aggregation__agreement="true",
        )
    )
    fleet = {name: teacher for name, teacher in teachers().items() if name != "t2"}

    def kept(there: dict[str, LocalTeacher]) -> dict[str, torch.Tensor]:
        """Interrupted in the first round: what the hints of each count by image."""
        with pytest.raises(Interrupted):
            train(config, two_tasks(), there, tmp_path, Watch("round 1", 2))
        nets = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["nets"]
        found = {key: net["each"] for key, net in nets.items() if key.startswith(AGREEMENT)}
        return {key.removeprefix(AGREEMENT).split()[0]: each for key, each in found.items()}

    before, after = kept(fleet), kept({"t0": fleet["t0"]})
    assert (before.keys(), after.keys()) == ({"t0", "t1"}, {"t0"})
    assert not torch.equal(before["t0"], after["t0"])


def test_options_go_together_and_with_several_tasks(tmp_path: Path) -> None:
    data = two_tasks()
    config = variant(
        **QUICK,
        aggregation__weights="learnt",
        aggregation__agreement="true",
        finetune__average="0.5",
        finetune__held_out="0.25",
    )
    result = train(config, data, teachers(), tmp_path)
    assert result.adapted is not None
    assert result.adapted.held_out == 12
    assert result.adapted.metric == "the mean over 2 tasks of accuracy"
    assert sum(result.learnt.values()) == pytest.approx(1)
    for name in data.tasks:
        assert np.isfinite(predict(result.student, DATA.transfer, name)).all()
