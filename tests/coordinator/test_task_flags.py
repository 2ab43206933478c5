from pathlib import Path

import pytest

from coordinator.cli import main, parse
from coordinator.settings import load_config
from coordinator.task_flags import require_settings
from edge_teacher.contract.errors import UsageError

TRAIN = ["train", "--signing-key", "k", "--broker", "mqtt://127.0.0.1:1"]


def test_flags_of_tasks_are_taken_whatever_their_names() -> None:
    options = parse([*TRAIN, "--tasks.a.probe", "x", "--seed", "1", "--tasks.b.c.kind=dense"])
    assert options.tasks == {"tasks.a.probe": "x", "tasks.b.c.kind": "dense"}
    assert options.seed == "1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*TRAIN, "--tasks.a.probe"], "--tasks.a.probe: expected one argument"),
        ([*TRAIN, "--tasks.a.probe", "--seed", "1"], "expected one argument"),
        ([*TRAIN, "--task.a.probe", "x"], "unrecognized arguments: --task.a.probe x"),
        (["config", "--tasks.a.probe", "x"], "unrecognized arguments: --tasks.a.probe x"),
    ],
)
def test_what_is_no_flag_is_said(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, r"data\.probe is not set: name it with --data\.probe"),
        ({"data.probe": "p"}, r"data\.transfer is not set"),
        ({"tasks.a.kind": "dense"}, r"tasks\.a\.probe is not set: name it with --tasks\.a\.probe"),
        ({"tasks.a.probe": "p"}, r"data\.transfer is not set"),
    ],
)
def test_what_has_no_default_is_asked_for(given: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        require_settings(load_config(None, {"broker.url": "mqtt://h:1", **given}, {}))


def test_enough_is_enough() -> None:
    base = {"broker.url": "mqtt://h:1"}
    require_settings(load_config(None, base | {"data.probe": "p", "data.transfer": "t"}, {}))
    own = {"tasks.a.probe": "p", "tasks.b.probe": "q", "tasks.b.transfer": "t"}
    require_settings(load_config(None, base | own, {}))


def test_a_single_task_needs_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data.probe", "p", "--data.transfer", "t", "--runs", str(tmp_path)]
    assert main([*TRAIN, *data]) == 2
    assert "--task is not given, which a new run needs" in " ".join(capsys.readouterr().err.split())
