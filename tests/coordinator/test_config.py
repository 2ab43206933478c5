from pathlib import Path

import msgspec
import pytest
import tomllib

from coordinator import settings as module
from coordinator.config import Config
from coordinator.settings import config_toml, environment_name, example_config, load_config
from edge_teacher.contract.errors import UsageError


def write(path: Path, text: str) -> Path:
    (path / "fedsa.toml").write_text(text)
    return path / "fedsa.toml"


def test_the_example_is_the_defaults_and_explains_every_key(tmp_path: Path) -> None:
    text = example_config()
    assert (
        load_config(write(tmp_path, text), environ={}) == Config() == load_config(None, environ={})
    )
    assigned = [line for line in text.splitlines() if " = " in line]
    assert len(assigned) == len(module._KEYS)
    assert all(len(line.split("  # ")[1]) > 8 for line in assigned)


def test_a_config_survives_its_toml(tmp_path: Path) -> None:
    changed = load_config(
        None,
        {"data.probe": 'a "b" \\ ü', "selection.strategy": "sampled", "aggregation.flips": "false"},
        {},
    )
    assert changed.data.probe == 'a "b" \\ ü'
    assert load_config(write(tmp_path, config_toml(changed)), environ={}) == changed
    tomllib.loads(config_toml(changed))


def test_flags_go_over_the_environment_over_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "[selection]\nk = 4\nevery_rounds = 4\n[warmup]\nepochs = 4\n")
    environ = {"FEDSA_SELECTION_K": "5", "FEDSA_SELECTION_EVERY_ROUNDS": "5", "HOME": "/"}
    found = load_config(file, {"selection.k": "6"}, environ)
    assert found.selection.k == 6
    assert found.selection.every_rounds == 5
    assert found.warmup.epochs == 4
    assert found.selection.strategy == Config().selection.strategy


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSA_SEED", "7")
    assert load_config(None).seed == 7


def test_no_two_keys_share_a_variable() -> None:
    names = [environment_name(key) for key in module._KEYS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[selektion]\nk = 3", "no configuration key selektion .*did you mean selection"),
        ("[selection]\nkk = 3", r"no configuration key selection.kk .*did you mean selection\.k\?"),
        ("k = 3", r"did you mean selection\.k\?"),
        ("[selection]\nk = '3'", "selection.k .*it must be int, got str"),
        ("[selection]\nk = true", "selection.k .*it must be int, got bool"),
        ("[selection]\nk = 3.5", "selection.k .*it must be int, got float"),
        ("[selection]\nk = 0", "selection.k .*>= 1"),
        ("[selection]\nstrategy = 'best'", "selection.strategy .*'best'"),
        ("selection = 3", r"write it as \[selection\]"),
        ("seed = ", "is not TOML"),
        (
            "[aggregation]\nhint_pooled = 0\nhint_maps = 0\nsoft_targets = 0",
            "aggregation .*nothing to learn",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        load_config(write(tmp_path, text), environ={})
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml cannot be read: No such file"):
        load_config(tmp_path / "nowhere.toml", environ={})


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("FEDSA_SELECTION_KK", r"did you mean FEDSA_SELECTION_K\?"),
        ("FEDSA_SEDE", r"did you mean FEDSA_SEED\?"),
        ("FEDSA_WARMUP_XYZ", "sets no configuration key"),
    ],
)
def test_a_mistyped_variable_is_said(variable: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_config(None, environ={variable: "1"})


def test_variables_of_other_commands_are_left_alone() -> None:
    assert load_config(None, environ={"FEDSA_CI": "1"}) == Config()


def test_a_variable_that_resembles_a_key_is_not_passed_over() -> None:
    with pytest.raises(UsageError, match="FEDSA_BROKER sets no configuration key; did you mean"):
        load_config(None, environ={"FEDSA_BROKER": "localhost"})


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("selection.k", "x", "selection.k on the command line is 'x': it must be int"),
        ("selection.k", "3.5", "must be int"),
        ("aggregation.flips", "maybe", "must be bool"),
        ("selection.q", "3", "no configuration key selection.q"),
    ],
)
def test_a_wrong_flag_is_said(key: str, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_config(None, {key: text}, {})


def test_every_field_has_a_type_that_a_flag_can_give() -> None:
    for key, field in module._KEYS.items():
        default = field.default
        text = str(default).lower() if isinstance(default, bool) else str(default)
        assert msgspec.convert(text, field.type, strict=False) == default, key


def test_tasks_are_tables_and_flags_go_over_them(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '[data]\ntransfer = "u"\n[tasks.animals]\nprobe = "a"\n'
        '[tasks."a.b"]\nkind = "dense"\nprobe = "b"\nweight = 2.5\n',
    )
    flags = {"tasks.animals.weight": "0.5", "tasks.new.probe": "c", "tasks.a.b.test": "t"}
    found = load_config(file, flags, {})
    assert list(found.tasks) == ["animals", "a.b", "new"]
    assert found.tasks["animals"].weight == 0.5
    assert (found.tasks["a.b"].kind, found.tasks["a.b"].test) == ("dense", "t")
    assert load_config(write(tmp_path, config_toml(found)), environ={}) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tasks]\nprobe = 'x'\n", r"has a section for each task: write it as \[tasks.NAME\]"),
        ("[tasks.a]\nprobes = 'x'\n", r"tasks\.a\.probes .*a task has the keys kind, probe"),
        ("[tasks.a]\nweight = 0\n", r"weight in .*: it must be float > 0"),
        ("[data]\nprobe = 'x'\n[tasks.a]\nprobe = 'y'\n", "of a single task, and there are"),
    ],
)
def test_tasks_that_are_none_are_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_config(write(tmp_path, text), environ={})


def test_no_variable_sets_a_task() -> None:
    with pytest.raises(UsageError, match=r"FEDSA_TASKS_A_PROBE .* with --tasks\.NAME\.key"):
        load_config(None, environ={"FEDSA_TASKS_A_PROBE": "x"})
    with pytest.raises(UsageError, match=r"tasks\.a\.k .*a task has the keys"):
        load_config(None, {"tasks.a.k": "1"}, {})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("warmup.rate", "inf", "warmup.rate .* is inf: it must be a finite number"),
        ("seed", "99999999999999999999", "seed"),
        ("threads", "100000", "threads"),
    ],
)
def test_what_no_machine_can_take_is_refused(key: str, value: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_config(None, {key: value}, {})
