"""One task from teachers to deployed students: train, package, roll out, ask the devices, report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from coordinator.answers import AnswerCache
from coordinator.config import Config
from coordinator.connection import Connection
from coordinator.data import LabelledImages, TaskData
from coordinator.encodings import EncodingLedger
from coordinator.fleet import Device
from coordinator.packaging import PackagedStudent, next_version, package_student
from coordinator.parallel import in_parallel
from coordinator.progress import Progress
from coordinator.ranks import ALONE, Ranks
from coordinator.report import (
    TOTAL,
    Accuracy,
    CurvePoint,
    Pictures,
    Report,
    Round,
    Task,
    TeacherResult,
    Traffic,
    write_report,
)
from coordinator.rollout import predict, roll_out
from coordinator.selection import Evidence, Selection, common_size, similarities
from coordinator.shared_teachers import shared
from coordinator.teachers import RemoteTeacher, Teacher
from coordinator.tracking import UNTRACKED, Tracking
from coordinator.training import TrainingResult, train
from edge_teacher.contract.errors import CheckFailed
from edge_teacher.files import write_atomically

PICTURES = 10
CALIBRATION_IMAGES = 512
_SOFTWARE = ("torch", "onnx", "onnxruntime", "paho-mqtt", "numpy")


@dataclass
class Timings:
    """Seconds by stage, in the order in which the stages ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[stage] = round(self.seconds.get(stage, 0) + spent, 2)


@dataclass(frozen=True)
class TaskRun:
    """What `run_task` needs to know besides the connection."""

    command: str
    task: str
    config: Config
    data: TaskData
    folder: Path
    """Checkpoints, the student, its bundle and the report are written here."""
    cache: Path
    """Teachers' answers; shared by runs, since an answer depends on the bundle and the images only."""
    key: Ed25519PrivateKey
    """Signs the student."""
    deploy: bool
    ranks: Ranks = ALONE
    tracking: Tracking = UNTRACKED


def train_along(
    config: Config,
    data: TaskData,
    cache: Path,
    ranks: Ranks,
    connection: Connection,
    devices: Sequence[Device],
) -> None:
    """What of `run_task` all processes but the first do: ask their share, and train."""
    with AnswerCache(cache) as answers:
        teachers = _teachers(connection, devices, config, answers, EncodingLedger(), ranks)
        online = partial(_online, connection)
        # Nothing is written there.
        train(config, data, teachers, Path(os.devnull), online=online, ranks=ranks)


def _teachers(
    connection: Connection,
    devices: Sequence[Device],
    config: Config,
    cache: AnswerCache,
    ledger: EncodingLedger,
    ranks: Ranks,
) -> dict[str, Teacher]:
    patience_s = config.devices.patience_s
    remote = {
        d.name: RemoteTeacher(connection.caller, d.card, cache, ledger, patience_s=patience_s)
        for d in devices
    }
    return shared(remote, ranks)


def run_task(
    run: TaskRun,
    connection: Connection,
    devices: Sequence[Device],
    progress: Progress,
    timings: Timings,
) -> Report:
    """Train from `devices`, package, deploy to them if asked, and write the report.

    Raises what any of the stages raises; what was finished before stays in `run.folder` and is not
    done again by the next run there.
    """
    began = time.monotonic()
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    ledger = EncodingLedger()
    with AnswerCache(run.cache, progress.say) as cache:
        teachers = _teachers(connection, devices, run.config, cache, ledger, run.ranks)
        result = train(
            run.config,
            run.data,
            teachers,
            run.folder,
            progress,
            partial(_online, connection),
            run.ranks,
            run.tracking,
        )
    timings.seconds.update({stage: round(s, 2) for stage, s in result.seconds.items()})

    progress.begin("export", 1)
    with timings.of("export"):
        packaged = package_student(
            result.student,
            run.task,
            next_version(),
            some(run.data.transfer, CALIBRATION_IMAGES),
            run.data.test,
            run.key,
            largest_drop=run.config.student.largest_drop,
        )
        write_atomically(run.folder / "student.fedsa", packaged.bundle)
    progress.end()

    before = sum(timings.seconds.get(stage, 0) for stage in ("data", "start agents"))

    def report(deployed: dict[str, float] | None) -> Report:
        # A run that was gone on with has stages of earlier sessions.
        total = max(before + time.monotonic() - began, sum(timings.seconds.values()))
        found = Report(
            command=run.command,
            started=started,
            seed=run.config.seed,
            broker=connection.broker,
            task=_task(run),
            strategy=result.selections[-1].selection.strategy,
            teachers=_results(result.selections[-1].selection, devices),
            rounds=tuple(
                Round(number=s.round + 1, weights=s.selection.weights) for s in result.selections
            ),
            accuracy=_accuracy(result, packaged, deployed),
            curves=_curves(result),
            student=packaged.report,
            bytes_on_wire={
                device: {m: Traffic(sent=b.sent, received=b.received) for m, b in methods.items()}
                for device, methods in sorted(connection.caller.wire.items())
            },
            encodings=ledger.costs(),
            lost=result.lost,
            seconds={**timings.seconds, TOTAL: round(total, 2)},
            config=msgspec.to_builtins(run.config),
            software={
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _SOFTWARE},
            },
        )
        write_report(found, _pictures(result.looked_at, result), run.folder)
        return found

    # What was trained and exported is on record whatever the devices make of it.
    trained = report(deployed=None)
    if not run.deploy:
        return trained
    return report(_deploy(run, connection, devices, packaged, progress, timings))


def _online(connection: Connection) -> dict[str, str]:
    """Name to identity of who is there now."""
    return {device.name: device.card.bundle for device in connection.fleet.devices()}


def some(images: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """At most `count` of the images, evenly spread over all."""
    chosen: NDArray[np.uint8] = images[
        np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    ]
    return chosen


def _task(run: TaskRun) -> Task:
    return Task(
        name=run.task,
        classes=run.data.probe.classes,
        probe=len(run.data.probe),
        transfer=len(run.data.transfer),
        test=None if run.data.test is None else len(run.data.test),
    )


def _deploy(
    run: TaskRun,
    connection: Connection,
    devices: Sequence[Device],
    packaged: PackagedStudent,
    progress: Progress,
    timings: Timings,
) -> dict[str, float] | None:
    """Roll out to who is still there, then measure what the devices themselves answer."""
    online = {d.name for d in connection.fleet.devices()}
    absent = [d.name for d in devices if d.name not in online]
    if absent:
        progress.say(f"Not online any more, and left out: {', '.join(absent)}")
    there = [d for d in devices if d.name in online]
    names = [d.name for d in there]
    progress.begin("roll-out", len(names))
    with timings.of("roll-out"):
        roll_out(
            connection.caller, names, packaged.card, packaged.bundle, installed=progress.advance
        )
    progress.end()
    progress.say(f"Version {packaged.card.version} of {run.task} is active on {len(names)} devices")
    test = run.data.test
    if test is None:
        return None

    def ask(device: Device) -> float:
        answer = predict(connection.caller, device.card, run.task, test.images)
        if answer.version != packaged.card.version:
            raise CheckFailed(
                f"{device.name} answers with version {answer.version}, not {packaged.card.version}"
            )
        return float((answer.logits.argmax(1) == test.labels).mean())

    progress.begin("ask devices", len(names))
    with timings.of("ask devices"):
        accuracies = in_parallel(there, ask, progress.advance)
    progress.end()
    return dict(zip(names, accuracies, strict=True))


def _accuracy(
    result: TrainingResult, packaged: PackagedStudent, deployed: dict[str, float] | None
) -> Accuracy:
    int8 = packaged.report.files[packaged.card.graphs["int8_cpu"]]
    return Accuracy(
        scratch=result.accuracy.get("scratch"),
        fedsa_fp32=result.accuracy.get("fedsa"),
        fedsa_int8=int8.accuracy,
        deployed=deployed,
    )


def _results(selection: Selection, devices: Sequence[Device]) -> tuple[TeacherResult, ...]:
    cards = {d.name: d.card for d in devices}
    results = []
    for score in selection.teachers:
        height, width = cards[score.teacher].teacher.input_size
        tap = cards[score.teacher].teacher.taps[cards[score.teacher].teacher.saliency_tap]
        results.append(
            TeacherResult(
                id=score.teacher,
                score=score.score,
                similarity=score.similarity,
                probability=score.probability,
                selected=score.selected,
                weight=score.weight,
                reason=score.reason,
                about=f"{cards[score.teacher].teacher.name}, input {height} × {width}, "
                f"{tap.channels} features",
            )
        )
    return tuple(results)


def _curves(result: TrainingResult) -> dict[str, tuple[CurvePoint, ...]]:
    """Per network, with the images seen since its first step: stages count from their own."""
    curves: dict[str, list[CurvePoint]] = {}
    seen: dict[str, int] = {}
    last: dict[str, tuple[str, int]] = {}
    for point in result.curve:
        network = "scratch" if point.stage == "scratch" else "fedsa"
        stage, images = last.get(network, (point.stage, 0))
        if stage != point.stage:
            seen[network] = seen.get(network, 0) + images
        last[network] = (point.stage, point.images)
        curves.setdefault(network, []).append(
            CurvePoint(
                stage=point.stage,
                images_seen=seen.get(network, 0) + point.images,
                loss=point.loss,
                accuracy=point.accuracy,
            )
        )
    return {network: tuple(points) for network, points in curves.items()}


def _pictures(probe: LabelledImages, result: TrainingResult) -> Pictures:
    """One probe image of each class, up to PICTURES, with everybody's maps."""
    chosen = [int(np.flatnonzero(probe.labels == c)[0]) for c in np.unique(probe.labels)[:PICTURES]]
    evidence = Evidence(result.student_maps, result.teacher_maps)
    size = common_size(evidence)
    student = result.student_maps[chosen]
    maps: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {
        name: found[chosen] for name, found in result.teacher_maps.items()
    }
    return Pictures(
        images=probe.images[chosen],
        student=student,
        teachers=dict(maps),
        similarities={name: similarities(student, found, size) for name, found in maps.items()},
        labels=tuple(probe.classes[int(probe.labels[i])] for i in chosen),
    )
