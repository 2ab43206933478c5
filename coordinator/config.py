"""The configuration of `fedsa train`: one TOML file, environment variables and flags over it.

Every key is a field below, with its type, range, default and meaning; nothing else is a key, and
the example that `example_config` gives is made from the same fields. A key is `section.key`: in the
file under `[section]`, in the environment `FEDSA_SECTION_KEY`, as a flag `--section.key`. Several tasks
are `[tasks.NAME]` in the file and `--tasks.NAME.key` as flags; no variable sets them.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomllib
from msgspec import Meta

from edge_teacher.contract.errors import UsageError

_PREFIX = "FEDSA_"
TASKS = "tasks"
"""The section whose tables are tasks."""

Architecture = Literal["residual", "mobilenet", "vgg"]


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Image folders, tar archives (or folders inside them), or .npz files."""

    probe: Annotated[str, Meta(description="labelled images: <class>/<name>.jpg")] = ""
    transfer: Annotated[str, Meta(description="unlabelled images of the same kind")] = ""
    test: Annotated[str, Meta(description="labelled images to measure by; empty: none")] = ""
    kind: Annotated[str, Meta(description="of the task: single-label, multi-label or dense")] = (
        "single-label"
    )


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of several tasks that a student learns at once; its name is that of its section."""

    kind: Annotated[str, Meta(description="single-label, multi-label or dense")] = "single-label"
    probe: Annotated[str, Meta(description="labelled images of this task")] = ""
    test: Annotated[str, Meta(description="labelled images to measure by; empty: none")] = ""
    transfer: Annotated[
        str, Meta(description="unlabelled images, joined with those of data.transfer")
    ] = ""
    weight: Annotated[float, Meta(gt=0, description="of this task in every loss")] = 1.0


class BrokerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the devices are met, and with `mqtts://` what to show there."""

    url: Annotated[str, Meta(description="mqtt://HOST:PORT or mqtts://HOST:PORT")] = ""
    ca: Annotated[str, Meta(description="certificate authority of the broker")] = ""
    certificate: Annotated[str, Meta(description="the coordinator's certificate")] = ""
    key: Annotated[str, Meta(description="the coordinator's private key")] = ""
    name: Annotated[str, Meta(description="the coordinator's id (its certificate's CN)")] = (
        "coordinator"
    )


class DevicesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long devices are waited for, and how many may be lost."""

    patience_s: Annotated[
        float,
        Meta(gt=0, le=86400, description="seconds that one answer may take; then it is set aside"),
    ] = 120.0
    least: Annotated[
        int, Meta(ge=1, description="teachers without which the run ends; the others may be lost")
    ] = 1


class StudentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The network that is trained and deployed."""

    architecture: Annotated[
        Architecture, Meta(description="one of ours: residual, mobilenet or vgg")
    ] = "residual"
    channels: Annotated[
        int,
        Meta(ge=8, le=256, description="of the first stage; the feature map has 6 times as many"),
    ] = 24
    module: Annotated[
        str, Meta(description="a network of your own, package.module:factory; empty: one of ours")
    ] = ""
    feature_layer: Annotated[
        str, Meta(description="of the module; its output is the feature map; empty: the module's")
    ] = ""
    device: Annotated[
        Literal["cpu", "cuda"], Meta(description="where it is trained: cpu or cuda")
    ] = "cpu"

    largest_drop: Annotated[
        float,
        Meta(ge=0, le=1, description="of accuracy by quantising, as a fraction; more is refused"),
    ] = 0.02

    def __post_init__(self) -> None:
        if self.feature_layer and not self.module:
            raise ValueError("feature_layer names a layer of student.module, which is not set")


class WarmupConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The student learns from the probe set alone, so that it looks somewhere at all."""

    epochs: Annotated[int, Meta(ge=1, description="passes over the probe set")] = 10
    rate: Annotated[float, Meta(gt=0, description="the greatest learning rate")] = 0.05


class SelectionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which teachers take part, by where they and the student look."""

    strategy: Annotated[
        Literal["evidence", "logme", "cosine", "sampled", "random", "all", "oracle"],
        Meta(
            description="evidence or logme (of labels), cosine or sampled (the paper's), random, all, oracle"
        ),
    ] = "evidence"
    k: Annotated[int, Meta(ge=1, description="how many teachers are chosen")] = 3
    every_rounds: Annotated[int, Meta(ge=1, description="select again after so many rounds")] = 7
    sticky: Annotated[
        float, Meta(ge=0, description="added to the score of who was selected last; 0: nothing is")
    ] = 0.0


class AggregationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The student learns what the selected teachers say of the transfer set. A weight 0 is off."""

    form: Annotated[
        Literal["joint", "fedavg"],
        Meta(description="joint: one student, all losses; fedavg: a copy per teacher, averaged"),
    ] = "joint"
    rounds: Annotated[int, Meta(ge=1, description="how often, in all")] = 14
    epochs: Annotated[int, Meta(ge=1, description="passes over the images in each round")] = 1
    rate: Annotated[float, Meta(gt=0, description="the greatest learning rate")] = 0.1
    hint_maps: Annotated[float, Meta(ge=0, description="weight of feature map hints")] = 0.0
    hint_pooled: Annotated[float, Meta(ge=0, description="weight of pooled feature hints")] = 1.0
    soft_targets: Annotated[
        float, Meta(ge=0, description="weight of the task head's soft predictions")
    ] = 1.0
    weights: Annotated[
        Literal["selection", "learnt"],
        Meta(description="of the teachers' hints: the selection's, or learnt from these on"),
    ] = "selection"
    agreement: Annotated[
        bool,
        Meta(
            description="hints count less where the teacher looks elsewhere; asks saliency of all images"
        ),
    ] = False
    temperature: Annotated[
        float, Meta(gt=0, description="of the soft predictions; below 1 sharpens")
    ] = 0.5
    views: Annotated[
        int,
        Meta(
            ge=0, description="fixed random views of each unlabelled image that are asked about too"
        ),
    ] = 0
    refits: Annotated[
        int,
        Meta(
            ge=0, description="times the task head is fitted again, on the student's features too"
        ),
    ] = 3
    flips: Annotated[
        bool, Meta(description="ask for mirrored images too: twice the queries, better features")
    ] = True

    def __post_init__(self) -> None:
        if not (self.hint_maps or self.hint_pooled or self.soft_targets):
            raise ValueError("hint_maps, hint_pooled and soft_targets are all 0: nothing to learn")
        if self.agreement and not (self.hint_maps or self.hint_pooled):
            raise ValueError(
                "agreement is about hints, and hint_maps and hint_pooled are both 0; set one of them, or "
                "agreement to false"
            )
        if self.weights == "learnt" and not (self.hint_maps or self.hint_pooled):
            raise ValueError(
                "weights are to be learnt of hints, and hint_maps and hint_pooled are both 0; set one of "
                'them, or weights to "selection"'
            )


class HeadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The task head: logistic regression on the selected teachers' pooled features."""

    folds: Annotated[int, Meta(ge=2, description="of the cross-validation of its penalty")] = 5


class FinetuneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fresh head is trained on the probe set."""

    epochs: Annotated[int, Meta(ge=0, description="passes over the probe set")] = 5
    rate: Annotated[float, Meta(gt=0, description="the greatest learning rate")] = 0.005
    average: Annotated[
        float,
        Meta(ge=0, le=1, description="share of its steps, the last, whose weights are averaged"),
    ] = 0.0
    held_out: Annotated[
        float,
        Meta(ge=0, le=0.5, description="share of the labels to choose its best epoch by"),
    ] = 0.0
    patience: Annotated[
        int, Meta(ge=0, description="epochs without a better one before it stops; 0: it does not")
    ] = 0

    def __post_init__(self) -> None:
        if not self.epochs and (self.average or self.held_out):
            raise ValueError("epochs is 0: there is nothing to average, nor to choose an epoch of")
        if self.patience and not self.held_out:
            raise ValueError(
                "patience waits for a better epoch by held-out labels, and held_out is 0; set it to 0.2, say"
            )


class ScratchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The baseline: the same network trained on the probe set alone."""

    epochs: Annotated[int, Meta(ge=0, description="passes over the probe set; 0: no baseline")] = 40
    rate: Annotated[float, Meta(gt=0, description="the greatest learning rate")] = 0.05


class DistributedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Several processes, started with torchrun, that train one student."""

    join_s: Annotated[
        float, Meta(gt=0, description="seconds in which all processes must have met")
    ] = 120.0
    silence_s: Annotated[
        float, Meta(gt=0, description="seconds that a process waits for what another is doing")
    ] = 1800.0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it."""

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="of every random choice")] = 0
    threads: Annotated[
        int, Meta(ge=0, le=1024, description="of the processor; 0: all its cores")
    ] = 0
    batch: Annotated[int, Meta(ge=2, description="images in one step of training")] = 64
    shift: Annotated[int, Meta(ge=0, description="pixels a training image is shifted at most")] = 4
    weight_decay: Annotated[float, Meta(ge=0, description="of every weight, in every step")] = 5e-4
    checkpoint_s: Annotated[
        float, Meta(ge=0, description="seconds of training that a killed process loses at most")
    ] = 10.0
    broker: BrokerConfig = BrokerConfig()
    devices: DevicesConfig = DevicesConfig()
    data: DataConfig = DataConfig()
    student: StudentConfig = StudentConfig()
    warmup: WarmupConfig = WarmupConfig()
    selection: SelectionConfig = SelectionConfig()
    aggregation: AggregationConfig = AggregationConfig()
    head: HeadConfig = HeadConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    scratch: ScratchConfig = ScratchConfig()
    distributed: DistributedConfig = DistributedConfig()
    tasks: dict[str, TaskConfig] = {}

    def __post_init__(self) -> None:
        if self.tasks and (self.data.probe or self.data.test):
            raise ValueError(
                "data.probe and data.test are of a single task, and there are [tasks]: give each of these "
                "its own probe and test"
            )


def load_config(
    path: Path | None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Defaults, then the file, then FEDSA_… variables, then `overrides` ({"section.key": text}).

    `environ` is the process's environment unless given. Raises UsageError for a file that cannot be
    read, a key that does not exist (naming the nearest that does), or a value of the wrong type or
    out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_toml(path)
        _require_known(values, f"in {path}")
        _convert(values, f"in {path}")
    for origin, texts in (
        ("in the environment", _from_environment(os.environ if environ is None else environ)),
        ("on the command line", dict(overrides or {})),
    ):
        for key, text in texts.items():
            if _field(key) is None:
                raise UsageError(_unknown(key, origin))
            section, _, name = key.rpartition(".")
            task = task_of(key)
            if task is not None:
                target = values.setdefault(TASKS, {}).setdefault(task, {})
            else:
                target = values.setdefault(section, {}) if section else values
            target[name] = _parse(key, text, origin)
        _convert(values, origin)
    return _convert(values, "")


def config_toml(config: Config) -> str:
    """`config` as TOML that `load_config` reads back to the same values, every key explained."""
    lines: list[str] = []
    for section, struct in ((None, config), *_sections(config)):
        if section:
            lines += ["", f"# {_first_line(struct)}", f"[{section}]"]
        for field in msgspec.structs.fields(struct):
            value = getattr(struct, field.name)
            if not isinstance(value, (msgspec.Struct, dict)):
                lines.append(f"{field.name} = {_toml(value)}  # {_description(field)}")
    return "\n".join(lines) + "\n"


def example_config() -> str:
    """The defaults as a commented TOML file."""
    return config_toml(Config())


def task_of(key: str) -> str | None:
    """The task that a key `tasks.NAME.key` is of; None for any other key."""
    parts = key.split(".")
    return ".".join(parts[1:-1]) if parts[0] == TASKS and len(parts) > 2 else None


def config_keys() -> dict[str, str]:
    """Every key there is, `section.key`, with its meaning."""
    return {key: _description(field) for key, field in _KEYS.items()}


def environment_name(key: str) -> str:
    """`selection.k` -> `FEDSA_SELECTION_K`."""
    return _PREFIX + re.sub(r"[.\-]", "_", key).upper()


def _sections(config: Config) -> Iterator[tuple[str, msgspec.Struct]]:
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, msgspec.Struct):
            yield field.name, value
    for name, task in config.tasks.items():
        yield f"{TASKS}.{_toml(name)}", task


def _keys() -> dict[str, msgspec.structs.FieldInfo]:
    """Every key there is, `section.key`, with its field."""
    keys = {}
    for field in msgspec.structs.fields(Config):
        if isinstance(field.default, msgspec.Struct):
            for inner in msgspec.structs.fields(field.default):
                keys[f"{field.name}.{inner.name}"] = inner
        elif field.name != TASKS:
            keys[field.name] = field
    return keys


_KEYS = _keys()
_TASK_FIELDS = {field.name: field for field in msgspec.structs.fields(TaskConfig)}
_SECTIONS = {key.split(".")[0] for key in _KEYS if "." in key}


def _field(key: str) -> msgspec.structs.FieldInfo | None:
    if task_of(key) is not None:
        return _TASK_FIELDS.get(key.rpartition(".")[2])
    return _KEYS.get(key)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"The configuration {path} is not TOML: {error}.") from error


def _require_known(values: dict[str, Any], origin: str) -> None:
    for name, value in values.items():
        if name == TASKS:
            _require_tasks(value, origin)
        elif name in _SECTIONS:
            if not isinstance(value, dict):
                raise UsageError(f"{name} {origin} is a section: write it as [{name}].")
            for inner in value:
                if f"{name}.{inner}" not in _KEYS:
                    raise UsageError(_unknown(f"{name}.{inner}", origin))
        elif name not in _KEYS:
            raise UsageError(_unknown(name, origin))


def _require_tasks(value: Any, origin: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(task, dict) for task in value.values()):
        raise UsageError(f"tasks {origin} has a section for each task: write it as [tasks.NAME].")
    for task, keys in value.items():
        for key in keys:
            if key not in _TASK_FIELDS:
                raise UsageError(_unknown(f"{TASKS}.{task}.{key}", origin))


def _unknown(key: str, origin: str) -> str:
    task = task_of(key)
    if task is not None:
        keys = ", ".join(_TASK_FIELDS)
        return f"There is no configuration key {key} ({origin}); a task has the keys {keys}."
    near = difflib.get_close_matches(key, [*_KEYS, *_SECTIONS], n=1, cutoff=0.4)
    # A right name in the wrong section is the commonest slip, and far in spelling.
    same = [k for k in _KEYS if k.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = same or near
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    return f"There is no configuration key {key} ({origin}){hint}"


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The keys that FEDSA_… variables set.

    A variable that neither begins with a section's name nor resembles a key is another command's.
    """
    names = {environment_name(key): key for key in _KEYS}
    found = {}
    for variable in sorted(v for v in environ if v.startswith(_PREFIX)):
        if variable in names:
            found[names[variable]] = environ[variable]
            continue
        if variable.startswith(environment_name(TASKS) + "_"):
            raise UsageError(
                f"The environment variable {variable} sets no configuration key; tasks are set in the "
                "file, or with --tasks.NAME.key."
            )
        ours = any(variable.startswith(environment_name(s) + "_") for s in _SECTIONS)
        near = difflib.get_close_matches(variable, names, n=1, cutoff=0.4 if ours else 0.85)
        if ours or near:
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"The environment variable {variable} sets no configuration key{hint}")
    return found


def _parse(key: str, text: str, origin: str) -> Any:
    """A text from the environment or a flag as its key's type; `key` is one that there is."""
    field = _field(key)
    assert field is not None
    try:
        return msgspec.convert(text, field.type, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{key} {origin} is {text!r}: {_sentence(error)} ({_description(field)})."
        ) from error


def _convert(values: dict[str, Any], origin: str) -> Config:
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        where = re.search(r"`\$\.?([^`]*)`", str(error))
        key = where.group(1) if where else "the configuration"
        meaning = f" ({_description(_KEYS[key])})" if key in _KEYS else ""
        raise UsageError(f"{key} {origin}: {_sentence(error)}{meaning}.") from error
    _require_finite(msgspec.to_builtins(config), "", origin)
    return config


def _require_finite(values: Mapping[str, Any], place: str, origin: str) -> None:
    """TOML and Python read `inf`, which is in every range that has no upper end."""
    for name, value in values.items():
        if isinstance(value, dict):
            _require_finite(value, f"{place}{name}.", origin)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{place}{name} {origin} is {value}: it must be a finite number.")


def _sentence(error: msgspec.ValidationError) -> str:
    return str(error).split(" - at ")[0].replace("`", "").replace("Expected", "it must be")


def _description(field: msgspec.structs.FieldInfo) -> str:
    metas = getattr(field.type, "__metadata__", ())
    return next((meta.description for meta in metas if meta.description), field.name)


def _first_line(struct: msgspec.Struct) -> str:
    return (type(struct).__doc__ or "").strip().splitlines()[0]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's string escapes are all TOML's too.
        return msgspec.json.encode(value).decode()
    return repr(value)
