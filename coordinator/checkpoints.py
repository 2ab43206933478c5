"""The state of a training run on disk: written whole, after and within every stage, to go on from.

What is written is all that the rest of the run depends on: the nets with their batch norm's
statistics, the momentum, where in which stage the loop is, every random state, the selections.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from coordinator.adapted import Adapted
from coordinator.config import BrokerConfig, Config, DevicesConfig, DistributedConfig
from coordinator.data import SINGLE, SeveralTasks
from coordinator.files import load_tensors, save_tensors
from coordinator.ranks import ALONE, Ranks
from coordinator.roster import Lost
from coordinator.selection import Selection
from edge_teacher.contract.errors import UsageError

State = Mapping[str, Tensor]

COPY = "copy "
"""How the names of nets begin that are copies of the student for a part of a stage."""


TARGETS = "targets of "
"""How the names of a task's targets begin."""

AGREEMENT = "agreement of "
"""How the names begin of what teachers' hints count by image."""


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
    """The selection made before round `round`, counted from 0, for one of the tasks.

    `stage` is `fine-tune` for one that was made after the last round, because somebody was lost; `round`
    is then how many there were.
    """

    round: int
    selection: Selection
    task: str = SINGLE
    stage: str = ""


class Record(msgspec.Struct):
    """All of a run's state that is not a tensor."""

    config: dict[str, Any]
    """Key to value, of the settings that decide the result."""
    data: str
    teachers: dict[str, str]
    """Name to identity."""
    finished: list[str] = []
    steps: int = 0
    """Of all stages so far."""
    losses: list[float] = []
    """Of the steps since the last point of the curve."""
    curve: list[CurvePoint] = []
    selections: list[RoundSelection] = []
    accuracy: dict[str, float] = {}
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    """By net, task and metric."""
    seconds: dict[str, float] = {}
    lost: list[Lost] = []
    """Teachers that were set aside, in the order in which they were."""
    refitted: dict[str, float] = {}
    """By the name of a task's targets, where the student had a part in them: how good their head is."""
    adapted: Adapted | None = None
    """What of the fine-tuning was kept, where that was to choose."""
    learnt: dict[str, float] = {}
    """By teacher, what its hints weighed at the end of the last stage, where that is learnt."""
    about: dict[str, str] = {}
    """By teacher, what it is, in words: for one that is gone when the report is written."""


@dataclass(frozen=True)
class Midway:
    """Where in a stage that is not finished the loop is, and what it had in hand there.

    Attributes:
        epoch, step: how many epochs are finished, and how many steps of the next.
        optimiser: its state_dict.
        epoch_random: the stage's generator as it was before the epoch's order was drawn.
        random: the same as it is now.
    """

    stage: str
    epoch: int
    step: int
    optimiser: dict[str, Any]
    epoch_random: Tensor
    random: Tensor


class Run:
    """A run in a folder: `record`, the weights of its nets, and how far it has come.

    `midway` is where an earlier process was when it was last seen in a stage; `random` has the
    state of a generator that several stages share, by the stage that used it last.
    """

    def __init__(
        self,
        folder: Path,
        record: Record,
        nets: dict[str, State],
        midway: Midway | None = None,
        random: dict[str, Tensor] | None = None,
        *,
        written: bool = True,
    ) -> None:
        """Where it is not `written`, another process keeps it on disk."""
        self.folder = folder
        self.record = record
        self.nets = nets
        self.midway = midway
        self.random = random or {}
        self.written = written
        self._running: dict[str, float] = {}

    @classmethod
    def open(
        cls,
        folder: Path,
        config: Config,
        data: SeveralTasks,
        teachers: Mapping[str, str],
        ranks: Ranks = ALONE,
        about: Mapping[str, str] | None = None,
    ) -> Run:
        """Begin a run in `folder`, or go on with the one that is there.

        Raises UsageError if the run there was started with other settings, data or teachers: going
        on would mix two experiments. Teachers may be missing, and one that the run had set aside may
        have another network. Only the first of several processes has the folder.
        """
        fresh = Record(_settings(config), fingerprint(data), dict(sorted(teachers.items())))
        fresh.about = dict(about or {})
        for what in ("config", "data", "teachers"):
            ranks.require_same(f"the {what}", getattr(fresh, what))
        run = ranks.first_does(lambda: cls._open(folder, fresh))
        run.written = ranks.first
        return run

    @classmethod
    def _open(cls, folder: Path, fresh: Record) -> Run:
        path = _path(folder)
        if not path.exists():
            return cls(folder, fresh, {})
        run = _read(path)
        for what in ("config", "data", "teachers"):
            if what == "teachers" and _none_is_another(run.record, fresh):
                continue
            if what == "config" and not _other_settings(run.record.config, fresh.config):
                continue
            if getattr(run.record, what) != getattr(fresh, what):
                raise UsageError(
                    f"{folder} holds a run with other {what}{_difference(run.record, fresh, what)}; "
                    "go on with the same, or name a new folder."
                )
        # One that was begun before these were kept has them from now on.
        run.record.about = fresh.about | run.record.about
        return run

    def selected(self, number: int) -> bool:
        """Whether the selection before round `number` is made; a round that goes on keeps it."""
        return any(made.round == number for made in self.record.selections)

    def has(self, stage: str) -> bool:
        return stage in self.record.finished

    def finish(self, stage: str, nets: Mapping[str, State], random: Tensor | None = None) -> None:
        """The stage is over, and these are the nets now. On disk when this returns."""
        self.record.finished.append(stage)
        if random is not None:
            self.random[stage] = random
        self.midway = None
        self.nets.update(nets)
        self.save()

    def pause(self, midway: Midway, nets: Mapping[str, State]) -> None:
        """The stage goes on, and this is how far it is. On disk when this returns."""
        self.midway = midway
        self.nets.update(nets)
        self.save()

    def began(self, stage: str) -> bool:
        """Whether an earlier process learnt something in this stage, or finished a part of it."""
        parts = f"{stage}, "
        inside = self.midway is not None and f"{self.midway.stage}, ".startswith(parts)
        return inside or any(done.startswith(parts) for done in self.record.finished)

    def begin_again(self, stage: str) -> None:
        """A stage that is not finished starts from its first step, with the nets as they are."""
        self.midway = None
        self.record.losses.clear()
        self.record.curve = [point for point in self.record.curve if point.stage != stage]
        self.forget_parts(stage)

    def forget(self, stage: str) -> None:
        """The stage was finished, and is to be done again."""
        self.record.finished = [done for done in self.record.finished if done != stage]

    def keep_refitted(self, scores: Mapping[str, float], targets: Mapping[str, State]) -> None:
        """Targets that the student had a part in, and how good their head is; on disk with them."""
        self.record.refitted.update(scores)
        self.nets.update(targets)

    def forget_targets(self, kept: Iterable[str]) -> None:
        """Drop all targets but these: they are of a student that had learnt less."""
        wanted = set(kept)
        for key in [key for key in self.nets if key.startswith(TARGETS) and key not in wanted]:
            del self.nets[key]
            self.record.refitted.pop(key, None)

    def keep_agreement(self, agreement: Mapping[str, State]) -> None:
        """What hints count by image, of the selection that holds now; that of others is dropped. On disk
        when this returns: the student that it was found with is about to change."""
        for key in [k for k in self.nets if k.startswith(AGREEMENT) and k not in agreement]:
            del self.nets[key]
        self.nets.update(agreement)
        self.save()

    def forget_parts(self, stage: str) -> None:
        """Drop what only the parts of a stage needed, which finishes next: copies and their random."""
        self.random.clear()
        for key in [key for key in self.nets if key.startswith(COPY)]:
            del self.nets[key]
        parts = f"{stage}, "
        self.record.finished = [s for s in self.record.finished if not s.startswith(parts)]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds that the block takes to `record.seconds[what]`."""
        self._running[what] = time.monotonic()
        try:
            yield
        finally:
            self._count(what)
            del self._running[what]

    def _count(self, what: str) -> None:
        now = time.monotonic()
        spent = now - self._running[what]
        self.record.seconds[what] = self.record.seconds.get(what, 0.0) + spent
        self._running[what] = now

    def save(self) -> None:
        """Put all of it on disk, as it is now; unless another process does."""
        if not self.written:
            return
        for what in self._running:
            self._count(what)
        state = {
            "record": msgspec.json.encode(self.record).decode(),
            "nets": self.nets,
            "midway": None if self.midway is None else vars(self.midway),
            "random": self.random,
        }
        save_tensors(_path(self.folder), state)


def begun(folder: Path) -> bool:
    """Whether there is a run in `folder` that can be gone on with."""
    return _path(folder).exists()


def waited_for(folder: Path, named: Sequence[str]) -> list[str]:
    """Of those `named`, or of all that a run in `folder` has, those that it has not lost."""
    if not begun(folder):
        return list(named)
    record = _read(_path(folder)).record
    away = {one.teacher for one in record.lost if not one.back}
    return [name for name in named or record.teachers if name not in away]


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


def _read(path: Path) -> Run:
    what = "a checkpoint of this version"
    state = load_tensors(path, what)
    try:
        record = msgspec.json.decode(state["record"], type=Record)
        midway = None if state["midway"] is None else Midway(**state["midway"])
        return Run(path.parent, record, dict(state["nets"]), midway, dict(state["random"]))
    except (KeyError, TypeError, msgspec.DecodeError) as error:
        raise UsageError(f"{path} is not {what}: {error}; name a new folder.") from error


def _settings(config: Config) -> dict[str, Any]:
    """What decides the result: not the broker, the threads, patience or how often it is saved."""
    neutral = msgspec.structs.replace(
        config,
        broker=BrokerConfig(),
        devices=DevicesConfig(),
        distributed=DistributedConfig(),
        threads=0,
        checkpoint_s=0,
    )
    found: dict[str, Any] = {}
    for key, value in msgspec.to_builtins(neutral).items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            found[key] = value
    return found


def _other_settings(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The keys whose values differ. A run from before a key was there had its default."""
    default = _settings(Config())
    return [
        key
        for key in sorted(there.keys() | here.keys())
        if there.get(key, default.get(key)) != here.get(key, default.get(key))
    ]


def _none_is_another(there: Record, here: Record) -> bool:
    """Nobody is new, and nobody that the run learns from has another network; some may be missing."""
    away = {one.teacher for one in there.lost if not one.back}
    return all(
        name in there.teachers and (name in away or there.teachers[name] == identity)
        for name, identity in here.teachers.items()
    )


def _difference(there: Record, here: Record, what: str) -> str:
    if what == "config":
        key = _other_settings(there.config, here.config)[0]
        default = _settings(Config())
        old, new = (one.config.get(key, default.get(key)) for one in (there, here))
        return f" ({key} is {old!r} there and {new!r} here)"
    if what == "teachers":
        parts = {
            "new": here.teachers.keys() - there.teachers.keys(),
            "another network now": {
                name
                for name in there.teachers.keys() & here.teachers.keys()
                if there.teachers[name] != here.teachers[name]
            }
            - {one.teacher for one in there.lost if not one.back},
        }
        said = [f"{why}: {', '.join(sorted(names))}" for why, names in parts.items() if names]
        return f" ({'; '.join(said)}; --device chooses)"
    return ""
