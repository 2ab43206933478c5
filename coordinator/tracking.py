"""Numbers of a run while it runs: to TensorBoard always, to MLflow where MLFLOW_TRACKING_URI is set.

A run that goes on, goes on in the same record. What cannot be written is said once and costs the run
nothing else: numbers are for people, and no reason to lose a night's training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import msgspec

from coordinator.config import Config

FOLDER = "tensorboard"

_POINT_EVERY_S = 1.0


class Sink(Protocol):
    """One place where numbers go. Anything may be raised but by the constructor."""

    @property
    def name(self) -> str: ...

    def begin(self, step: int) -> None:
        """The run goes on after `step` steps; what was written of later ones is void."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def end(self, *, failed: bool) -> None: ...


class Tracking:
    """All places at once. A step counts from the first of the run, over all of its stages."""

    def __init__(self, sinks: list[Sink], say: Callable[[str], None]) -> None:
        self._sinks = sinks
        self._say = say

    def begin(self, step: int) -> None:
        self._each(lambda sink: sink.begin(step))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, such as `round/loss/total`, `selection/<teacher>`, `accuracy/fedsa`."""
        if values:
            self._each(lambda sink: sink.write(step, values))

    def end(self, *, failed: bool) -> None:
        self._each(lambda sink: sink.end(failed=failed))

    def _each(self, do: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                do(sink)
            except Exception as error:  # noqa: BLE001  # whatever it is, the run goes on
                self._sinks.remove(sink)
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._say(f"{sink.name} cannot be written any more ({said}); going on without it")
                with suppress(Exception):
                    sink.end(failed=True)


UNTRACKED = Tracking([], lambda _sentence: None)


@contextmanager
def tracked(
    folder: Path, name: str, config: Config, say: Callable[[str], None]
) -> Iterator[Tracking]:
    """What the run in `folder` is tracked by, while it runs.

    Raises UsageError, before anything is trained, if MLflow is asked for and is not installed;
    CheckFailed if its server cannot be used.
    """
    sinks: list[Sink] = [TensorBoard(folder / FOLDER)]
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        from coordinator.tracking_mlflow import MlflowRun

        sinks.append(MlflowRun(uri, folder, name, _flat(config)))
    tracking = Tracking(sinks, say)
    try:
        yield tracking
    except BaseException:
        tracking.end(failed=True)
        raise
    tracking.end(failed=False)


class TensorBoard:
    """Event files in a folder, read by `tensorboard --logdir`."""

    name = "TensorBoard's event file"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        goes_on = self._folder.exists()
        self._writer = SummaryWriter(
            str(self._folder), purge_step=step + 1 if goes_on else None, flush_secs=1
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, *, failed: bool) -> None:
        if writer := getattr(self, "_writer", None):
            writer.close()


class Meter:
    """Means over the steps since the last point; a point about every second, and one at the end."""

    def __init__(self, tracking: Tracking, lesson: str) -> None:
        """`lesson` is a stage's name; all rounds ("round 3", "round 3, t1") make one curve."""
        self._tracking = tracking
        self._kind = lesson.split(",")[0].rstrip("0123456789 ")
        self._sums: dict[str, float] = {}
        self._steps = self._images = 0
        self._since = time.monotonic()
        self._due = self._since

    def step(self, number: int, parts: Mapping[str, float], rate: float, images: int) -> None:
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self._images += images
        if time.monotonic() >= self._due:
            self.point(number, rate)

    def point(self, number: int, rate: float) -> None:
        if not self._steps:
            return
        now = time.monotonic()
        values = {
            f"{self._kind}/loss/{name}": total / self._steps for name, total in self._sums.items()
        }
        values[f"{self._kind}/rate"] = rate
        values[f"{self._kind}/images_per_s"] = self._images / max(now - self._since, 1e-9)
        self._tracking.write(number, values)
        self._sums.clear()
        self._steps = self._images = 0
        self._since = time.monotonic()
        self._due = self._since + _POINT_EVERY_S


def numbers(struct: msgspec.Struct) -> dict[str, float]:
    """The numbers in a struct by name; those in mappings inside it as `name/key`."""
    found: dict[str, float] = {}
    for name, value in msgspec.structs.asdict(struct).items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": float(v) for key, v in value.items() if v is not None}
        elif isinstance(value, (int, float)):
            found[name] = float(value)
    return found


def _flat(config: Config) -> dict[str, str]:
    """Settings by key. The broker's are not the experiment's, and nobody else's business."""
    flat: dict[str, str] = {}
    for key, value in msgspec.to_builtins(config).items():
        if key == "broker":
            continue
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{key}.{name}".rstrip("."): str(setting) for name, setting in inner}
    return flat
