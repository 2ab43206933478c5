from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coordinator.config import Config
from coordinator.tracking import FOLDER, tracked
from coordinator.training import TrainingResult, train
from edge_teacher.contract.errors import CheckFailed, UsageError
from tests.coordinator.test_training import DATA, Interrupted, Watch, teachers, variant

CONFIG = variant(scratch__epochs="2", aggregation__rounds="2", aggregation__hint_maps="0.5")


def run(folder: Path, watch: Watch | None = None) -> tuple[TrainingResult, list[str]]:
    said: list[str] = []
    with tracked(folder, "mine", CONFIG, said.append) as tracking:
        return train(CONFIG, DATA, teachers(), folder, watch, tracking=tracking), said


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder / FOLDER))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_has_losses_rates_accuracies_and_selections(tmp_path: Path) -> None:
    result, said = run(tmp_path)
    assert said == []
    found = events(tmp_path)
    for part in ("total", "hint_maps", "hint_pooled", "soft_targets"):
        assert len(found[f"round/loss/{part}"]) >= 2, part
    for kind in ("scratch", "warm-up", "round", "fine-tune"):
        assert all(value > 0 for _, value in found[f"{kind}/images_per_s"])
        assert all(0 < rate <= 0.1 for _, rate in found[f"{kind}/rate"])
        assert all(step > 0 for step, _ in found[f"{kind}/loss/total"])
    assert found["accuracy/fedsa"][-1][1] == pytest.approx(result.accuracy["fedsa"])
    assert found["accuracy/scratch"][-1][1] == pytest.approx(result.accuracy["scratch"])
    weights = result.selections[0].selection.weights
    for name in ("t0", "t1", "t2"):
        assert found[f"selection/{name}"][0][1] == pytest.approx(weights.get(name, 0.0))


def test_a_run_that_goes_on_goes_on_in_the_same_events(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", Watch("round 2", 3))
    run(tmp_path / "cut")
    whole, cut = events(tmp_path / "whole"), events(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for tag in ("scratch/loss/total", "round/loss/total", "fine-tune/loss/total"):
        steps = [step for step, _ in cut[tag]]
        assert steps == sorted(set(steps)), f"{tag}: what was done again is there twice"
        assert cut[tag][-1] == whole[tag][-1]
    assert cut["accuracy/fedsa"] == whole["accuracy/fedsa"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"file:{tmp_path / 'store'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return uri


def test_mlflow_has_the_settings_and_one_run_however_often_it_was_begun(
    tmp_path: Path, store: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, Watch("round 2", 3))
    client = MlflowClient(tracking_uri=store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "fedsa"]
    (begun,) = client.search_runs([experiment.experiment_id])
    assert begun.info.status == "FAILED"
    result, said = run(folder)
    assert said == []
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == begun.info.run_id
    assert found.info.run_name == "mine"
    assert found.info.status == "FINISHED"
    assert found.data.params["aggregation.rounds"] == "2"
    assert not [key for key in found.data.params if key.startswith("broker")]
    assert found.data.metrics["accuracy/fedsa"] == pytest.approx(result.accuracy["fedsa"])
    history = client.get_metric_history(found.info.run_id, "round/loss/total")
    assert len({point.step for point in history}) >= 2


class Losing(Watch):
    """Takes the store away at the beginning of a stage."""

    def __init__(self, store: Path) -> None:
        super().__init__()
        self.store = store

    def begin(self, stage: str, steps: int, done: int = 0) -> None:
        super().begin(stage, steps, done)
        if stage == "warm-up":
            shutil.rmtree(self.store)
            self.store.write_text("no folder any more")


def test_a_store_that_is_lost_is_said_once_and_the_run_goes_on(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.tracking_mlflow._SEND_EVERY_S", 0.0)
    result, said = run(tmp_path / "run", Losing(tmp_path / "store"))
    (sentence,) = said
    assert sentence.startswith("MLflow cannot be written any more (")
    assert result.accuracy["fedsa"] > 0
    assert "accuracy/fedsa" in events(tmp_path / "run")


def test_a_package_that_is_missing_is_said_before_anything_is_done(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "mlflow"]:
        monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(UsageError, match=r"is not installed .* pip install 'fedsa-edge\[mlflow\]'"),
        tracked(tmp_path, "mine", Config(), print),
    ):
        pass


def test_a_store_that_cannot_be_used_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(CheckFailed, match=r"MLflow at http://127.0.0.1:9 cannot be used"),
        tracked(tmp_path, "mine", Config(), print),
    ):
        pass
