from pathlib import Path

import pytest

from coordinator import processes
from coordinator.cli import main
from coordinator.report import read_report
from coordinator.resume import Begun, begun_with, keep
from coordinator.settings import load_config
from edge_teacher.contract.errors import UsageError
from tests.brokers import Mosquitto
from tests.coordinator.small_fleet import small_fleet

BEGUN = Begun(
    task="tints",
    signing_key="c.key",
    deploy=True,
    devices=(),
    config=load_config(None, {"broker.url": "mqtt://there:1883", "selection.k": "2"}, {}),
)


def test_a_run_s_name_is_enough_to_go_on_with_it(tmp_path: Path) -> None:
    keep(tmp_path / "mine", BEGUN, ["a", "b"])
    found = begun_with(tmp_path / "mine", None, {})
    # Who was there is who is waited for: a run cannot go on with others.
    assert found == Begun("tints", "c.key", True, ("a", "b"), BEGUN.config)


def test_flags_and_another_file_go_over_what_was_kept(tmp_path: Path) -> None:
    keep(tmp_path / "mine", BEGUN, ["a"])
    moved = begun_with(tmp_path / "mine", None, {"broker.url": "mqtt://here:1883"})
    assert moved.config.broker.url == "mqtt://here:1883"
    assert moved.config.selection.k == 2
    (tmp_path / "other.toml").write_text("seed = 7\n")
    assert begun_with(tmp_path / "mine", tmp_path / "other.toml", {}).config.seed == 7


def test_a_run_that_is_not_there_is_said_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tmp_path / "mine", BEGUN, ["a"])
    assert main(["train", "--runs", str(tmp_path), "--resume", "yours"]) == 2
    assert "there is no run yours" in capsys.readouterr().err
    with pytest.raises(UsageError, match="there: mine"):
        begun_with(tmp_path / "yours", None, {})


def test_a_setting_that_is_refused_is_not_kept(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with small_fleet(tmp_path, mosquitto.address, transfer=60) as fleet:
        runs = tmp_path / "runs"
        assert main(fleet.train(runs, "--name", "mine")) == 0
        kept = [(runs / "mine" / file).read_text() for file in ("settings.toml", "command.json")]
        resume = ["train", "--runs", str(runs), "--resume", "mine"]
        assert main([*resume, "--selection.k", "2", "--seed", "5"]) == 2
        assert kept == [
            (runs / "mine" / file).read_text() for file in ("settings.toml", "command.json")
        ]
        assert main(resume) == 0


@pytest.mark.timeout(200)
def test_one_that_died_since_is_waited_for_a_while_and_then_gone_on_without(
    tmp_path: Path, mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    with small_fleet(tmp_path, mosquitto.address, transfer=60) as fleet:
        assert main(fleet.train(runs, "--name", "mine")) == 0
        processes.stop(fleet.agents[:1])
        capsys.readouterr()
        assert main(["train", "--runs", str(runs), "--resume", "mine"]) == 0
    assert "Missing, and the run goes on without: left" in capsys.readouterr().err
    (lost,) = read_report(runs / "mine").lost
    assert (lost.teacher, lost.stage) == ("left", "resume")


def test_a_file_that_is_broken_is_said(tmp_path: Path) -> None:
    keep(tmp_path / "mine", BEGUN, ["a"])
    (tmp_path / "mine" / "command.json").write_text("{")
    with pytest.raises(UsageError, match=r"command\.json cannot be read"):
        begun_with(tmp_path / "mine", None, {})


@pytest.mark.parametrize("missing", ["--task", "--signing-key"])
def test_what_a_new_run_needs_is_named(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--task": "t", "--signing-key": "c.key"}
    del given[missing]
    assert main(["train", *(word for pair in given.items() for word in pair)]) == 2
    assert f"{missing} is not given" in capsys.readouterr().err
