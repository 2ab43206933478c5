"""Teachers that fail in a run: set aside, named, and the run goes on without them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from coordinator.checkpoints import Run
from coordinator.config import Config
from coordinator.data import as_several
from coordinator.results import rounds
from coordinator.training import train
from edge_teacher.contract.errors import CheckFailed, UsageError
from tests.coordinator.liars import SPOILT, Liar
from tests.coordinator.local_teacher import LocalTeacher, random_teacher
from tests.coordinator.test_training import CONFIG, DATA, Interrupted, Watch, states

QUICK = msgspec.structs.replace(
    CONFIG,
    scratch=msgspec.structs.replace(CONFIG.scratch, epochs=0),
    warmup=msgspec.structs.replace(CONFIG.warmup, epochs=1),
    finetune=msgspec.structs.replace(CONFIG.finetune, epochs=1),
)


def changed(section: str, config: Config = QUICK, **values: object) -> Config:
    part = msgspec.structs.replace(getattr(config, section), **values)
    return msgspec.structs.replace(config, **{section: part})


EVERYBODY = changed("selection", strategy="all")


def honest(*names: str) -> dict[str, LocalTeacher]:
    return {name: random_teacher(name, i, 8 + 4 * i) for i, name in enumerate(names)}


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("method", ["saliency", "pooled", "features"])
def test_one_that_fails_is_set_aside_and_named_and_the_others_teach(
    tmp_path: Path, method: str, spoil: str
) -> None:
    fleet = honest("a", "b") | {"liar": Liar("liar", 6, method, SPOILT[spoil])}
    watch = Watch()
    result = train(EVERYBODY, DATA, fleet, tmp_path, watch)
    (lost,) = result.lost
    assert lost.teacher == "liar"
    assert lost.stage.startswith("saliency" if method == "saliency" else "features before round 1")
    assert lost.reselected == (method != "saliency")
    assert result.selections[-1].selection.weights.keys() == {"a", "b"}
    assert any("Set aside: liar" in sentence for sentence in watch.said)
    # As if it had never been there.
    without = train(EVERYBODY, DATA, honest("a", "b"), tmp_path / "without")
    assert all(torch.equal(states(without)[k], v) for k, v in states(result).items())


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_one_that_looks_the_same_everywhere_on_every_image_looks_nowhere(
    tmp_path: Path, value: float
) -> None:
    liar = Liar("liar", 6, "saliency", lambda maps: np.full_like(maps, value))
    result = train(QUICK, DATA, honest("a", "b") | {"liar": liar}, tmp_path)
    (lost,) = result.lost
    assert "flat saliency map for each of 24 images" in lost.why


def test_flat_maps_on_most_images_are_no_reason(tmp_path: Path) -> None:
    def flat_but_one(maps: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(maps))[:, None, None] == 3, maps, 0).astype(np.float32)

    shy = Liar("shy", 6, "saliency", flat_but_one)
    assert train(QUICK, DATA, honest("a", "b") | {"shy": shy}, tmp_path).lost == ()


def test_k_is_lowered_to_who_is_left_and_that_is_said(tmp_path: Path) -> None:
    fleet = honest("a") | {"liar": Liar("liar", 6, "saliency", SPOILT["gone"])}
    watch = Watch()
    result = train(QUICK, DATA, fleet, tmp_path, watch)
    assert result.selections[0].selection.weights == {"a": 1.0}
    assert "selection.k is 2, and 1 can be asked: k is 1" in watch.said


def test_too_few_left_ends_the_run_naming_everyone_and_it_can_be_gone_on_with(
    tmp_path: Path,
) -> None:
    config = changed("devices", EVERYBODY, least=2)
    liars = {
        "mute": Liar("mute", 7, "saliency", SPOILT["gone"]),
        "nan": Liar("nan", 6, "pooled", SPOILT["not a number"]),
    }
    fleet = honest("a") | liars
    with pytest.raises(CheckFailed) as ended:
        train(config, DATA, fleet, tmp_path)
    for words in ("devices.least is 2", "mute", "went offline", "nan", "not finite"):
        assert words in str(ended.value)
    # Patience may be changed for a run that goes on; the two are well again.
    for liar in liars.values():
        liar.honest = True
    watch = Watch()
    result = train(changed("devices", EVERYBODY), DATA, fleet, tmp_path, watch)
    assert "warm-up" not in [name for name, _ in watch.stages]
    assert {lost.teacher: lost.back for lost in result.lost} == {
        "mute": "saliency",
        "nan": "saliency",
    }
    assert result.selections[0].selection.weights.keys() == {"a", "mute", "nan"}
    assert [s.round for s in result.selections] == [0, 2]


def test_nobody_left(tmp_path: Path) -> None:
    fleet = {n: Liar(n, 1, "saliency", SPOILT["infinite"]) for n in ("x", "y")}
    with pytest.raises(CheckFailed, match=r"of 2 teachers 0 can be asked.*x \(.*y \("):
        train(QUICK, DATA, fleet, tmp_path)
    assert Run.open(tmp_path, QUICK, as_several(DATA), {"x": "x", "y": "y"}).has("warm-up")


def test_more_than_there_are_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"devices.least is 3, and there are 2 teachers"):
        train(changed("devices", least=3), DATA, honest("a", "b"), tmp_path)


def test_one_that_returns_takes_part_in_the_next_selection(tmp_path: Path) -> None:
    liar = Liar("liar", 6, "saliency", SPOILT["gone"])
    there = {"a": "a", "b": "b"}
    watch = Watch()

    class Returns(Watch):
        def begin(self, stage: str, steps: int, done: int = 0) -> None:
            super().begin(stage, steps, done)
            if stage == "round 2":
                liar.honest = True
                there["liar"] = "liar"

    watch = Returns()
    fleet = honest("a", "b") | {"liar": liar}
    result = train(EVERYBODY, DATA, fleet, tmp_path, watch, lambda: there)
    first, second = result.selections
    assert first.selection.weights.keys() == {"a", "b"}
    assert second.selection.weights.keys() == {"a", "b", "liar"}
    assert result.lost[0].back == "saliency before round 3"


def test_one_that_returns_with_another_network_stays_out(tmp_path: Path) -> None:
    liar = Liar("liar", 6, "saliency", SPOILT["gone"])
    there = {"a": "a", "b": "b", "liar": "another"}
    result = train(
        EVERYBODY, DATA, honest("a", "b") | {"liar": liar}, tmp_path, None, lambda: there
    )
    assert result.lost[0].back == ""
    assert "another network" in result.lost[0].why
    assert liar.questions == 0


def test_one_that_goes_when_all_was_answered_is_named_at_the_end(tmp_path: Path) -> None:
    there = {"a": "a", "b": "b"}

    class Leaves(Watch):
        def begin(self, stage: str, steps: int, done: int = 0) -> None:
            super().begin(stage, steps, done)
            if stage == "fine-tune":
                del there["b"]

    result = train(EVERYBODY, DATA, honest("a", "b"), tmp_path, Leaves(), lambda: there)
    (lost,) = result.lost
    assert (lost.teacher, lost.stage, lost.reselected) == ("b", "end", False)
    assert result.selections[-1].selection.weights.keys() == {"a", "b"}


def test_the_same_failure_again_is_one_story(tmp_path: Path) -> None:
    fleet = honest("a", "b") | {"liar": Liar("liar", 6, "pooled", SPOILT["not a number"])}
    config = changed("aggregation", changed("selection", EVERYBODY, every_rounds=1), rounds=3)
    result = train(config, DATA, fleet, tmp_path)
    (lost,) = result.lost
    assert lost.back == ""
    assert [s.round for s in result.selections] == [0, 1, 2]
    for selection in result.selections:
        assert selection.selection.weights.keys() == {"a", "b"}


@pytest.mark.parametrize(("stage", "at"), [("round 2", 2), ("round 4", 1)])
def test_a_run_that_lost_somebody_is_gone_on_with_to_the_same_end(
    tmp_path: Path, stage: str, at: int
) -> None:
    def fleet() -> dict[str, LocalTeacher]:
        return honest("a", "b", "c") | {"liar": Liar("liar", 6, "pooled", SPOILT["gone"])}

    whole = train(EVERYBODY, DATA, fleet(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(EVERYBODY, DATA, fleet(), tmp_path / "parts", Watch(stage, at))
    # It may be missing now, for the run knows that it is.
    resumed = train(EVERYBODY, DATA, honest("a", "b", "c"), tmp_path / "parts")
    assert all(torch.equal(states(whole)[k], v) for k, v in states(resumed).items())
    assert [lost.teacher for lost in resumed.lost] == ["liar"]


def test_a_part_that_was_learnt_with_somebody_who_is_gone_is_learnt_again(tmp_path: Path) -> None:
    config = msgspec.structs.replace(
        changed("aggregation", EVERYBODY, form="fedavg"), checkpoint_s=1e9
    )
    fleet = honest("a", "b") | {"c": Liar("c", 2, "pooled", SPOILT["gone"], after=4)}
    of_a_part = -(-(24 + 60) // config.batch)
    with pytest.raises(Interrupted):
        train(config, DATA, fleet, tmp_path, Watch("round 2", of_a_part + 2))
    watch = Watch()
    train(config, DATA, fleet, tmp_path, watch)
    assert "round 2, a" in [name for name, _ in watch.stages]
    assert any("round 2 begins again" in said for said in watch.said)


@pytest.mark.parametrize("form", ["joint", "fedavg"])
@pytest.mark.parametrize("killed", ["round 3", "round 4", "fine-tune"])
def test_heads_that_were_fitted_again_are_for_those_who_replace_somebody_too(
    tmp_path: Path, form: str, killed: str
) -> None:
    config = changed("selection", EVERYBODY, every_rounds=4)
    config = changed("aggregation", config, form=form, refits=1)
    config = msgspec.structs.replace(changed("finetune", config, epochs=3), checkpoint_s=0.0)
    fleet = honest("a", "b", "c")
    with pytest.raises(Interrupted):
        train(config, DATA, fleet, tmp_path, Watch(killed, 2))
    left = {name: name for name in "ab"}
    before = Run.open(tmp_path, config, as_several(DATA), left).record
    assert len(before.refitted) == 1
    # And when it is killed once more, its targets are those by the student as it was.
    with pytest.raises(Interrupted):
        train(config, DATA, honest("a", "b"), tmp_path, Watch(killed, 2))
    between = Run.open(tmp_path, config, as_several(DATA), left)
    (key,) = between.record.refitted.keys() - before.refitted.keys()
    targets = {name: part.clone() for name, part in between.nets[key].items()}
    watch = Watch()
    train(config, DATA, honest("a", "b"), tmp_path, watch)
    after = Run.open(tmp_path, config, as_several(DATA), left)
    assert key.endswith(" by a, b")
    assert all(torch.equal(after.nets[key][name], part) for name, part in targets.items())
    assert after.record.refitted[key] == between.record.refitted[key]
    assert [said for said in watch.said if " head " in said] == [
        "The task head was fitted again, on the student's own features too"
    ]
    refits = [stage for stage in after.record.finished if stage.startswith("refit")]
    assert refits == ["refit before round 3"]


def test_a_stage_that_begins_again_is_on_the_curve_once(tmp_path: Path) -> None:
    config = changed("finetune", EVERYBODY, epochs=10)
    config = msgspec.structs.replace(config, checkpoint_s=0.0)
    with pytest.raises(Interrupted):
        train(config, DATA, honest("a", "b", "c"), tmp_path, Watch("fine-tune", 8))
    result = train(config, DATA, honest("a", "b"), tmp_path)
    probe = len(DATA.probe)
    assert [p.images for p in result.curve if p.stage == "fine-tune"] == [5 * probe, 10 * probe]


def test_one_that_is_lost_at_the_fine_tuning_is_said_to_be(tmp_path: Path) -> None:
    config = changed("finetune", changed("aggregation", EVERYBODY, rounds=2), epochs=3)
    config = msgspec.structs.replace(config, checkpoint_s=0.0)
    fleet = honest("a", "b") | {"c": Liar("c", 2, "pooled", SPOILT["gone"], after=4)}
    with pytest.raises(Interrupted):
        train(config, DATA, fleet, tmp_path, Watch("fine-tune", 2))
    watch = Watch()
    result = train(config, DATA, fleet, tmp_path, watch)
    assert result.lost[0].stage == "features before fine-tuning"
    assert any(said.startswith("fine-tune begins again, from") for said in watch.said)
    (said,) = (said for said in watch.said if said.startswith("Selected"))
    assert said.startswith("Selected before fine-tuning: ")
    assert [(s.round, s.stage) for s in result.selections] == [(0, ""), (2, "fine-tune")]
    assert [(r.number, r.stage) for r in rounds(result)] == [(1, ""), (3, "fine-tune")]


def killed_in_round_2(config: Config, folder: Path) -> set[str]:
    """Who was selected by then, of a, b and c."""
    with pytest.raises(Interrupted):
        train(config, DATA, honest("a", "b", "c"), folder, Watch("round 2", 2))
    fleet = {name: name for name in "abc"}
    return set(
        Run.open(folder, config, as_several(DATA), fleet).record.selections[-1].selection.weights
    )


@pytest.mark.parametrize("selected", [True, False])
def test_one_that_died_between_two_sessions_is_lost_and_the_run_goes_on(
    tmp_path: Path, selected: bool
) -> None:
    chosen = killed_in_round_2(QUICK, tmp_path)
    dead = min(chosen if selected else set("abc") - chosen)
    left = {name: teacher for name, teacher in honest("a", "b", "c").items() if name != dead}
    watch = Watch()
    result = train(QUICK, DATA, left, tmp_path, watch)
    (lost,) = result.lost
    assert (lost.teacher, lost.stage, lost.reselected) == (dead, "resume", selected)
    assert dead not in result.selections[-1].selection.weights
    assert any(said.startswith(f"Set aside: {dead}: {dead} was not there") for said in watch.said)
    # Back with another network it stays out, and the others are still compared.
    other = honest("a", "b", "c")
    other[dead].identity = "another"
    again = train(QUICK, DATA, other, tmp_path)
    assert again.lost == result.lost
    assert other[dead].asked["saliency"] == 0
    other[min(left)].identity = "another"
    with pytest.raises(UsageError, match=rf"\(another network now: {min(left)}; --device"):
        train(QUICK, DATA, other, tmp_path)


def test_too_few_when_a_run_is_gone_on_with_is_refused_naming_who_is_missing(
    tmp_path: Path,
) -> None:
    config = changed("devices", QUICK, least=2)
    killed_in_round_2(config, tmp_path)
    with pytest.raises(
        CheckFailed, match=r"of 3 teachers 1 can be asked.*b \(resume: .*c \(resume"
    ):
        train(config, DATA, honest("a"), tmp_path)
    result = train(config, DATA, honest("a", "b", "c"), tmp_path)
    assert {lost.teacher: lost.back for lost in result.lost} == {"b": "saliency", "c": "saliency"}


@pytest.mark.parametrize("form", ["joint", "fedavg"])
@pytest.mark.parametrize("saved_every_s", [0.0, 1000.0])
def test_one_selected_that_is_missing_when_the_run_goes_on_is_replaced(
    tmp_path: Path, saved_every_s: float, form: str
) -> None:
    """Its answers were in the memory of the first session only; what was learnt from it is kept."""
    config = changed("aggregation", EVERYBODY, form=form)
    config = msgspec.structs.replace(config, checkpoint_s=saved_every_s)
    fleet = honest("a", "b") | {"c": Liar("c", 2, "pooled", SPOILT["gone"], after=4)}
    with pytest.raises(Interrupted):
        train(config, DATA, fleet, tmp_path, Watch("round 2", 3))
    assert fleet["c"].asked["pooled"] > 0
    watch = Watch()
    result = train(config, DATA, fleet, tmp_path, watch)
    assert any("round 2 begins again" in said for said in watch.said) == (saved_every_s == 0)
    (lost,) = result.lost
    assert (lost.teacher, lost.stage) == ("c", "features before round 2")
    assert [s.round for s in result.selections] == [0, 1, 2]
    assert result.selections[1].selection.weights.keys() == {"a", "b"}
