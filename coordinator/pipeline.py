"""One task from teachers to deployed students: train, package, roll out, ask the devices, report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from coordinator.answers import RememberedAnswers
from coordinator.checkpoints import begun
from coordinator.config import Config
from coordinator.connection import Connection
from coordinator.data import SINGLE, SeveralTasks, TaskData, as_several
from coordinator.encodings import EncodingLedger
from coordinator.fleet import Device
from coordinator.packaging import (
    PackagedStudent,
    next_version,
    package_student,
    require_packageable,
)
from coordinator.parallel import in_parallel
from coordinator.progress import Progress
from coordinator.ranks import ALONE, Ranks
from coordinator.report import (
    TOTAL,
    Pictures,
    Report,
    Task,
    Traffic,
    write_report,
)
from coordinator.results import (
    Deployed,
    about,
    curves,
    joint_accuracy,
    joint_metric,
    rounds,
    task_result,
    together,
)
from coordinator.rollout import predict, roll_out
from coordinator.selection import Evidence, common_size, similarities
from coordinator.shared_teachers import shared
from coordinator.teachers import RemoteTeacher, Teacher
from coordinator.tracking import UNTRACKED, Tracking
from coordinator.training import TrainingResult, student_spec, train
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
    """The student's name on the devices; with several tasks each student has its own task's name."""
    config: Config
    data: TaskData | SeveralTasks
    folder: Path
    """Checkpoints, the student, its bundle and the report are written here."""
    cache: Path
    """Teachers' answers; shared by runs, since an answer depends on the bundle and the images only."""
    key: Ed25519PrivateKey
    """Signs the student."""
    deploy: bool
    ranks: Ranks = ALONE
    tracking: Tracking = UNTRACKED
    accepted: Callable[[], None] = lambda: None
    """Called once the folder is known to be that of this very run."""


def train_along(
    config: Config,
    data: TaskData | SeveralTasks,
    cache: Path,
    ranks: Ranks,
    connection: Connection,
    devices: Sequence[Device],
) -> None:
    """What of `run_task` all processes but the first do: ask their share, and train."""
    require_exportable_student(config, data, Path(os.devnull), ranks)
    with RememberedAnswers(cache) as answers:
        teachers = _teachers(config, connection, devices, answers, EncodingLedger(), ranks)
        # Nothing is written there; who is online the first process says.
        train(config, data, teachers, Path(os.devnull), ranks=ranks)


def require_exportable_student(
    config: Config, data: TaskData | SeveralTasks, folder: Path, ranks: Ranks
) -> None:
    """A user's own network may be one that cannot be exported: that is known before it is trained.

    In all processes, what the first one finds, which has the folder; a run that is gone on with has been
    through it. Raises UsageError or CheckFailed.
    """

    def check() -> None:
        if not begun(folder):
            require_packageable(student_spec(config, as_several(data)))

    if config.student.module:
        ranks.first_does(check)


def _teachers(
    config: Config,
    connection: Connection,
    devices: Sequence[Device],
    cache: RememberedAnswers,
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
    require_exportable_student(run.config, run.data, run.folder, run.ranks)
    with RememberedAnswers(run.cache, progress.say) as cache:
        teachers = _teachers(run.config, connection, devices, cache, ledger, run.ranks)
        online = partial(_online, connection)
        result = train(
            run.config,
            run.data,
            teachers,
            run.folder,
            progress,
            online,
            ranks=run.ranks,
            tracking=run.tracking,
            about={device.name: about(device.card) for device in devices},
            accepted=run.accepted,
        )
    timings.seconds.update({stage: round(s, 2) for stage, s in result.seconds.items()})

    packaged = _package(run, result, progress, timings)

    before = sum(timings.seconds.get(stage, 0) for stage in ("data", "start agents"))

    def report(deployed: Deployed | None) -> Report:
        # A run that was gone on with has stages of earlier sessions.
        total = max(before + time.monotonic() - began, sum(timings.seconds.values()))
        tasks = tuple(
            task_result(name, _on_devices(run, name), result, packaged[name], deployed)
            for name in result.data.tasks
        )
        found = Report(
            command=run.command,
            started=started,
            seed=run.config.seed,
            broker=connection.broker,
            task=_task(run, result),
            strategy=result.selections[-1].selection.strategy,
            teachers=together(tasks),
            rounds=rounds(result),
            accuracy=joint_accuracy(tasks),
            curves=curves(result),
            student=tasks[0].student if len(tasks) == 1 else None,
            tasks=tasks,
            metric=joint_metric(tasks),
            learnt=dict(result.learnt),
            adapted=result.adapted,
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
        write_report(found, _pictures(result), run.folder)
        return found

    # What was trained and exported is on record whatever the devices make of it.
    trained = report(deployed=None)
    if not run.deploy:
        return trained
    return report(_deploy(run, result.data, connection, devices, packaged, progress, timings))


def _online(connection: Connection) -> dict[str, str]:
    """Name to identity of who is there now."""
    return {device.name: device.card.bundle for device in connection.fleet.devices()}


def some(images: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """At most `count` of the images, evenly spread over all."""
    chosen: NDArray[np.uint8] = images[
        np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    ]
    return chosen


def _package(
    run: TaskRun, result: TrainingResult, progress: Progress, timings: Timings
) -> dict[str, PackagedStudent]:
    """A signed bundle for each task, in the run's folder too."""
    packaged = {}
    version = next_version()
    progress.begin("export", len(result.data.tasks))
    with timings.of("export"):
        for name, task in result.data.tasks.items():
            packaged[name] = package_student(
                result.student,
                _on_devices(run, name),
                version,
                some(result.data.transfer, CALIBRATION_IMAGES),
                task.test,
                run.key,
                largest_drop=run.config.student.largest_drop,
                head=name,
            )
            file = "student.fedsa" if len(result.data.tasks) == 1 else f"student.{name}.fedsa"
            write_atomically(run.folder / file, packaged[name].bundle)
            progress.advance()
    progress.end()
    return packaged


def _on_devices(run: TaskRun, name: str) -> str:
    """A task's name there: its own, if it has one."""
    return run.task if name == SINGLE and len(as_several(run.data).tasks) == 1 else name


def _task(run: TaskRun, result: TrainingResult) -> Task:
    tasks = result.data.tasks.values()
    tests = [len(task.test) for task in tasks if task.test is not None]
    return Task(
        name=run.task,
        classes=tuple(name for task in tasks for name in task.classes),
        probe=sum(len(task.probe) for task in tasks),
        transfer=len(result.data.transfer),
        test=sum(tests) if tests else None,
    )


def _deploy(
    run: TaskRun,
    data: SeveralTasks,
    connection: Connection,
    devices: Sequence[Device],
    packaged: Mapping[str, PackagedStudent],
    progress: Progress,
    timings: Timings,
) -> Deployed:
    """Roll out to who is still there, then measure what the devices themselves answer."""
    online = {d.name for d in connection.fleet.devices()}
    absent = [d.name for d in devices if d.name not in online]
    if absent:
        progress.say(f"Not online any more, and left out: {', '.join(absent)}")
    there = [d for d in devices if d.name in online]
    names = [d.name for d in there]
    progress.begin("roll-out", len(names) * len(packaged))
    with timings.of("roll-out"):
        for student in packaged.values():
            roll_out(
                connection.caller, names, student.card, student.bundle, installed=progress.advance
            )
    progress.end()
    for student in packaged.values():
        card = student.card
        progress.say(f"Version {card.version} of {card.task} is active on {len(names)} devices")
    tested = {name: task.test for name, task in data.tasks.items() if task.test is not None}
    if not tested:
        return {}

    def ask(device: Device) -> dict[str, float]:
        found = {}
        for name, test in tested.items():
            card = packaged[name].card
            kind = data.tasks[name].kind
            answer = predict(connection.caller, device.card, card.task, test.images)
            if answer.version != card.version:
                raise CheckFailed(
                    f"{device.name} answers with version {answer.version}, not {card.version}"
                )
            found[name] = kind.measure(kind.kept(answer.logits), test.labels)[kind.metrics[0]]
        return found

    progress.begin("ask devices", len(names))
    with timings.of("ask devices"):
        answers = in_parallel(there, ask, progress.advance)
    progress.end()
    return {name: {d: a[name] for d, a in zip(names, answers, strict=True)} for name in tested}


def _pictures(result: TrainingResult) -> Pictures:
    """For each task a probe image of each class, PICTURES in all, with everybody's maps."""
    data = result.looked_at
    most = max(1, PICTURES // len(data.tasks))
    chosen: list[int] = []
    labels: list[str] = []
    for name, task in data.tasks.items():
        first = data.rows(name).start
        for image, shown in task.kind.examples(task.probe.labels, task.classes, most):
            chosen.append(first + image)
            labels.append(shown if len(data.tasks) == 1 else f"{name}: {shown}")
    size = common_size(Evidence(result.student_maps, result.teacher_maps))
    student = result.student_maps[chosen]
    maps: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {
        name: found[chosen] for name, found in result.teacher_maps.items()
    }
    # Of the student as it is now, like the maps: a selection was made by an earlier one's.
    every = {
        name: similarities(result.student_maps, found, size)
        for name, found in result.teacher_maps.items()
    }
    return Pictures(
        images=data.probe_images[chosen],
        student=student,
        teachers=dict(maps),
        similarities={name: found[chosen] for name, found in every.items()},
        likeness={name: float(found.mean()) for name, found in every.items()},
        labels=tuple(labels),
    )
