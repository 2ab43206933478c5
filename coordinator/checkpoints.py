"""The state of a training run on disk: written whole after every stage, read to go on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
from torch import Tensor

from coordinator.config import BrokerConfig, Config, config_toml
from coordinator.data import SINGLE, SeveralTasks
from coordinator.files import load_tensors, save_tensors
from coordinator.selection import Selection
from edge_teacher.contract.errors import UsageError

State = Mapping[str, Tensor]


class CurvePoint(msgspec.Struct, frozen=True):
    """One point of the learning curves. `images` were seen in this stage.

    `accuracy` is on test: the first metric of the task's kind, with several tasks their mean, of those
    that have a test set; `metrics` has all of them, by task.
    """

    stage: str
    images: int
    loss: float
    accuracy: float | None
    metrics: dict[str, dict[str, float]] = {}


class RoundSelection(msgspec.Struct, frozen=True):
    """The selection made before round `round`, counted from 0, for one of the tasks."""

    round: int
    selection: Selection
    task: str = SINGLE


class Record(msgspec.Struct):
    """All of a run's state that is not a tensor."""

    config: str
    data: str
    teachers: dict[str, str]
    """Name to identity."""
    finished: list[str] = []
    curve: list[CurvePoint] = []
    selections: list[RoundSelection] = []
    accuracy: dict[str, float] = {}
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    """By net, task and metric."""
    seconds: dict[str, float] = {}


class Run:
    """A run in a folder: `record`, the weights of its nets, and which stages are finished."""

    def __init__(self, folder: Path, record: Record, nets: dict[str, State]) -> None:
        self.folder = folder
        self.record = record
        self.nets = nets

    @classmethod
    def open(
        cls, folder: Path, config: Config, data: SeveralTasks, teachers: Mapping[str, str]
    ) -> Run:
        """Begin a run in `folder`, or go on with the one that is there.

        Raises UsageError if the run there was started with other settings, data or teachers: going
        on would mix two experiments.
        """
        fresh = Record(_settings(config), fingerprint(data), dict(sorted(teachers.items())))
        path = _path(folder)
        if not path.exists():
            return cls(folder, fresh, {})
        record, nets = _read(path)
        for what in ("config", "data", "teachers"):
            if getattr(record, what) != getattr(fresh, what):
                raise UsageError(
                    f"{folder} holds a run with other {what}{_difference(record, fresh, what)}; "
                    "go on with the same, or name a new folder."
                )
        return cls(folder, record, nets)

    def has(self, stage: str) -> bool:
        return stage in self.record.finished

    def finish(self, stage: str, nets: Mapping[str, State]) -> None:
        """The stage is over, and these are the nets now. On disk when this returns."""
        self.record.finished.append(stage)
        self.nets.update(nets)
        state = {"record": msgspec.json.encode(self.record).decode(), "nets": self.nets}
        save_tensors(_path(self.folder), state)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds that the block takes to `record.seconds[what]`."""
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.record.seconds[what] = self.record.seconds.get(what, 0.0) + spent


def fingerprint(data: SeveralTasks) -> str:
    """SHA-256 over the images, labels, classes, kinds and weights of the tasks."""
    digest = hashlib.sha256()
    digest.update(repr(data.transfer.shape).encode() + data.transfer.tobytes())
    for name, task in data.tasks.items():
        digest.update(repr((name, task.probe.kind, task.weight)).encode())
        for labelled in (task.probe, task.test):
            if labelled is not None:
                digest.update(repr((labelled.images.shape, labelled.classes)).encode())
                digest.update(labelled.images.tobytes() + labelled.labels.tobytes())
    return digest.hexdigest()


def _path(folder: Path) -> Path:
    return folder / "checkpoint.pt"


def _read(path: Path) -> tuple[Record, dict[str, State]]:
    what = "a checkpoint of this version"
    state = load_tensors(path, what)
    try:
        return msgspec.json.decode(state["record"], type=Record), dict(state["nets"])
    except (KeyError, TypeError, msgspec.DecodeError) as error:
        raise UsageError(f"{path} is not {what}: {error}; name a new folder.") from error


def _settings(config: Config) -> str:
    """What decides the result: neither the broker nor the number of threads does."""
    neutral = msgspec.structs.replace(config, broker=BrokerConfig(), threads=0)
    return config_toml(neutral)


def _difference(there: Record, here: Record, what: str) -> str:
    if what == "config":
        pairs = zip(there.config.splitlines(), here.config.splitlines(), strict=False)
        for old, new in pairs:
            if old != new:
                return f" ({old.split('  #')[0]} there, {new.split('  #')[0]} here)"
    if what == "teachers":
        parts = {
            "missing now": there.teachers.keys() - here.teachers.keys(),
            "new": here.teachers.keys() - there.teachers.keys(),
            "another network now": {
                name
                for name in there.teachers.keys() & here.teachers.keys()
                if there.teachers[name] != here.teachers[name]
            },
        }
        said = [f"{why}: {', '.join(sorted(names))}" for why, names in parts.items() if names]
        return f" ({'; '.join(said)}; --device chooses)"
    return ""
