"""A training run: warm up, select, aggregate, fine-tune; and the baseline it is judged by.

The order is the method's (Xie et al. 2022): the student is warmed up on the probe set, then for
some rounds learns from the teachers, selected again every so often as it changes, and at last gets
a fresh head that is trained on the probe set. The state is on disk after every stage; a run that
was interrupted goes on from the last finished one and ends with the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coordinator.amalgamation.aggregation import RoundPlan, run_round
from coordinator.amalgamation.answers import TeacherAnswers, ask
from coordinator.amalgamation.task import AmalgamationTask, Losses
from coordinator.augmentation import Jitter
from coordinator.checkpoints import CurvePoint, RoundSelection, Run
from coordinator.config import Config, ScratchConfig, WarmupConfig
from coordinator.data import SeveralTasks, TaskData, as_several
from coordinator.kinds.kind import Features, Fit
from coordinator.labels import Probes
from coordinator.measures import first_metric, measured
from coordinator.optimisation import (
    Descent,
    OneCycle,
    joint_batches,
    joint_steps,
    stage_generator,
    steps_per_epoch,
)
from coordinator.parallel import in_parallel
from coordinator.progress import Progress, Silent
from coordinator.selection import Evidence, Selection, select
from coordinator.student import (
    HeadSpec,
    Student,
    StudentSpec,
    features_of,
    grad_cam,
    pooled_features,
    save_student,
)
from coordinator.teachers import Teacher
from edge_teacher.contract.errors import UsageError

_MEASURE_EVERY_EPOCHS = 5
_MAPS = 500


@dataclass(frozen=True)
class TrainingResult:
    """What came out of a run.

    student_maps [P, s, s] and teacher_maps {name: [P, S, S]} are of the probe images, one task's after
    the other's (`data.rows`), the student's as it is at the end. Accuracies are the first metric of the
    task's kind on the test set, with several tasks the mean over those that have one, absent without
    any; `metrics` has every metric by net, task and name. Seconds are by stage.
    """

    data: SeveralTasks

    student: Student
    scratch: Student | None
    selections: tuple[RoundSelection, ...]
    student_maps: NDArray[np.float32]
    teacher_maps: Mapping[str, NDArray[np.float32]]
    curve: tuple[CurvePoint, ...]
    accuracy: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]
    seconds: Mapping[str, float]

    def last_selections(self) -> dict[str, Selection]:
        """By task."""
        return {found.task: found.selection for found in self.selections}


def train(
    config: Config,
    data: TaskData | SeveralTasks,
    teachers: Mapping[str, Teacher],
    folder: Path,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train a student for `data`, one task or several, from `teachers`, keeping state in `folder`.

    Writes `folder`/checkpoint.pt after every stage, and `folder`/student.pt at the end. Raises
    UsageError without teachers or if `folder` holds another run, CheckFailed for an answer that
    makes no sense, and whatever a teacher raises.
    """
    if not teachers:
        raise UsageError("There is no teacher to learn from; start at least one device.")
    require_enough(config, len(teachers))
    progress = progress or Silent()
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    tasks = as_several(data)
    run = Run.open(folder, config, tasks, {name: t.identity for name, t in teachers.items()})
    heads = {name: HeadSpec(t.probe.kind, t.classes) for name, t in tasks.tasks.items()}
    spec = StudentSpec.of_images(tasks.transfer, heads, config.student.channels)

    def stage(name: str) -> _Stage:
        return _Stage(name, config, tasks, run, progress)

    scratch = _new_student(spec, config.seed)
    if config.scratch.epochs:
        _learn_labels(stage("scratch"), "scratch", scratch, config.scratch)

    # The same first weights as the baseline's: what differs in the end is what the teachers gave.
    student = _new_student(spec, config.seed)
    _learn_labels(stage("warm-up"), "student", student, config.warmup)

    teacher_maps = _saliency(stage("saliency"), teachers)
    answers: dict[str, TeacherAnswers] = {}
    task: AmalgamationTask | None = None
    for number in range(config.aggregation.rounds):
        round_stage = stage(f"round {number + 1}")
        if round_stage.resumed(student=student):
            continue
        if number % config.selection.every_rounds == 0:
            _select(stage("select"), number, student, teacher_maps)
            task = None
        if task is None:
            task = _task(stage("ask"), student, teachers, answers)
        _aggregate(round_stage, number, task)

    if config.finetune.epochs:
        finetune = stage("fine-tune")
        if not finetune.resumed(student=student):
            if task is None:
                task = _task(stage("ask"), student, teachers, answers)
            _fine_tune(finetune, task)

    student.eval()
    scratch.eval()
    save_student(student, folder / "student.pt")
    trained = {"fedsa": student} | ({"scratch": scratch} if config.scratch.epochs else {})
    for name, net in trained.items():
        found = measured(net, tasks)
        if found:
            run.record.metrics[name] = found
            run.record.accuracy[name] = first_metric(found)
    return TrainingResult(
        data=tasks,
        student=student,
        scratch=trained.get("scratch"),
        selections=tuple(run.record.selections),
        student_maps=_student_maps(student, tasks),
        teacher_maps=teacher_maps,
        curve=tuple(run.record.curve),
        accuracy=run.record.accuracy,
        metrics=run.record.metrics,
        seconds=run.record.seconds,
    )


def _student_maps(student: Student, data: SeveralTasks) -> NDArray[np.float32]:
    """Where the student looks on each task's probe images with that task's head, [P, s, s]."""
    return np.concatenate(
        [grad_cam(student, task.probe.images, name) for name, task in data.tasks.items()]
    )


def require_enough(config: Config, teachers: int) -> None:
    """Known before the baseline and the warm-up, not after. Raises UsageError."""
    if config.selection.strategy != "all" and config.selection.k > teachers:
        there = "is 1 teacher" if teachers == 1 else f"are {teachers} teachers"
        raise UsageError(
            f"selection.k is {config.selection.k} and there {there}; "
            "start more of them or choose a smaller k."
        )


@dataclass(frozen=True)
class _Stage:
    """One stage of the run, and what every stage needs."""

    name: str
    config: Config
    data: SeveralTasks
    run: Run
    progress: Progress

    def resumed(self, **nets: nn.Module) -> bool:
        """Whether an earlier run finished this stage; then the nets are as it left them."""
        if not self.run.has(self.name):
            return False
        for key, net in nets.items():
            net.load_state_dict(self.run.nets[key])
        return True

    def finish(self, **nets: nn.Module) -> None:
        self.progress.end()
        self.run.finish(self.name, {key: net.state_dict() for key, net in nets.items()})

    def generator(self) -> torch.Generator:
        return stage_generator(self.config.seed, self.name)

    def measure(self, images: int, losses: list[float], student: Student) -> None:
        """Add a point to the learning curve. The test set is for reports: nothing depends on it."""
        found = measured(student, self.data)
        reached = first_metric(found) if found else None
        loss = float(np.mean(losses))
        self.run.record.curve.append(CurvePoint(self.name, images, loss, reached, found))
        losses.clear()


def _new_student(spec: StudentSpec, seed: int) -> Student:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Student(spec)


def _learn_labels(
    stage: _Stage, key: str, student: Student, recipe: WarmupConfig | ScratchConfig
) -> None:
    """The tasks' losses on their probe sets, from whatever `student` is."""
    if stage.resumed(**{key: student}):
        return
    config = stage.config
    probes = Probes(stage.data)
    generator = stage.generator()
    epochs = recipe.epochs
    steps = epochs * joint_steps(probes.sizes, config.batch)
    descent = Descent([student], OneCycle(recipe.rate, steps), config.weight_decay)
    stage.progress.begin(stage.name, steps)
    losses: list[float] = []
    student.train()
    with stage.run.timed(stage.name):
        for epoch in range(1, epochs + 1):
            for index in joint_batches(probes.sizes, config.batch, generator):
                loss = probes.loss(student, index, config.shift, generator)
                descent.step(loss)
                losses.append(float(loss.detach()))
                stage.progress.advance(losses[-1])
            if epoch % _MEASURE_EVERY_EPOCHS == 0 or epoch == epochs:
                stage.measure(epoch * sum(probes.sizes), losses, student)
    stage.finish(**{key: student})


def _saliency(stage: _Stage, teachers: Mapping[str, Teacher]) -> dict[str, NDArray[np.float32]]:
    """Where every teacher looks on the probe images; asked once, for teachers do not change."""
    names = sorted(teachers)
    probe = stage.data.probe_images
    stage.progress.begin(stage.name, len(teachers))
    with stage.run.timed(stage.name):
        answers = in_parallel(
            [teachers[name] for name in names],
            lambda teacher: teacher.saliency(probe),
            stage.progress.advance,
        )
    stage.progress.end()
    return dict(zip(names, answers, strict=True))


def _select(
    stage: _Stage,
    number: int,
    student: Student,
    teacher_maps: Mapping[str, NDArray[np.float32]],
) -> None:
    """Select for round `number`, for every task by where the student looks now with that task's head."""
    config = stage.config
    for i, (name, task) in enumerate(stage.data.tasks.items()):
        with stage.run.timed(stage.name):
            rows = stage.data.rows(name)
            evidence = Evidence(
                grad_cam(student, task.probe.images, name),
                {teacher: maps[rows] for teacher, maps in teacher_maps.items()},
            )
            # The first task's draws are those it has alone.
            rng = np.random.default_rng([config.seed, number, i] if i else [config.seed, number])
            selection = select(config.selection.strategy, evidence, config.selection.k, rng)
        stage.run.record.selections.append(RoundSelection(number, selection, name))
        shares = ", ".join(f"{name} ({weight:.2f})" for name, weight in selection.weights.items())
        of_task = f" for {name}" if len(stage.data.tasks) > 1 else ""
        stage.progress.say(f"Selected{of_task} before round {number + 1}: {shares}")


def _task(
    stage: _Stage,
    student: Student,
    teachers: Mapping[str, Teacher],
    answers: dict[str, TeacherAnswers],
) -> AmalgamationTask:
    """The task for the teachers selected last; `answers` keeps what was asked, for later rounds."""
    config, data = stage.config, stage.data
    selected = {found.task: found.selection.weights for found in stage.run.record.selections}
    asked = dict.fromkeys(name for weights in selected.values() for name in weights)
    missing = [name for name in asked if name not in answers]
    # Without soft targets nothing is fitted to the maps.
    by_maps = config.aggregation.soft_targets > 0 and any(
        t.kind.wants_maps for t in data.tasks.values()
    )
    stage.progress.begin(stage.name, len(missing))
    with stage.run.timed(stage.name):
        found = in_parallel(
            [teachers[name] for name in missing],
            lambda teacher: ask(
                teacher,
                data.probe_images,
                data.transfer,
                flips=config.aggregation.flips,
                maps=config.aggregation.hint_maps > 0 or by_maps,
                probe_maps=by_maps,
            ),
            stage.progress.advance,
        )
    answers.update(zip(missing, found, strict=True))
    stage.progress.end()
    with stage.run.timed("head"):
        task = AmalgamationTask(
            student,
            data,
            answers,
            selected,
            stage.run.nets,
            config.aggregation,
            config.head,
            config.seed,
        )
    for name, taught in task.taught.items():
        metric = data.tasks[name].kind.metrics[0].replace("_", " ")
        of_task = f" for {name}" if len(data.tasks) > 1 else ""
        stage.progress.say(
            f"A linear head on their features{of_task} reaches {taught.score:.1%} {metric} on the probe "
            "images, in cross-validation"
        )
    return task


def _aggregate(stage: _Stage, number: int, task: AmalgamationTask) -> None:
    config = stage.config
    steps = config.aggregation.epochs * steps_per_epoch(len(task), config.batch)
    plan = RoundPlan(
        number=number,
        epochs=config.aggregation.epochs,
        batch=config.batch,
        shift=config.shift,
        weight_decay=config.weight_decay,
        cycle=OneCycle(config.aggregation.rate, steps * config.aggregation.rounds),
    )
    copies = len(task.weights) if config.aggregation.form == "fedavg" else 1
    stage.progress.begin(stage.name, steps * copies)
    losses: list[float] = []

    def on_step(parts: Losses) -> None:
        losses.append(parts.total)
        stage.progress.advance(parts.total)

    with stage.run.timed("aggregate"):
        run_round(task, plan, stage.generator(), on_step)
        stage.measure((number + 1) * len(task) * config.aggregation.epochs, losses, task.student)
    stage.finish(**task.nets())


def _fine_tune(stage: _Stage, task: AmalgamationTask) -> None:
    """A fresh head, then all of the student at a low rate, on the labels of the probe set.

    The head is fitted like a task head, to features that hold still, and so does no harm to them.
    Every step also keeps up the aggregation's loss on as many transfer images: fifty images of a
    class would else have the student forget what thousands taught it.
    """
    config, data = stage.config, stage.data
    student = task.student
    recipe = config.finetune
    probes = Probes(data)
    generator = stage.generator()
    steps = recipe.epochs * joint_steps(probes.sizes, config.batch)
    stage.progress.begin(stage.name, steps)
    losses: list[float] = []
    with stage.run.timed(stage.name):
        _fresh_heads(student, data, Fit(config.head.folds, config.seed))
        student.train()
        modules = [student, *task.translators(task.weights)]
        descent = Descent(modules, OneCycle(recipe.rate, steps), config.weight_decay)
        for epoch in range(1, recipe.epochs + 1):
            for index in joint_batches(probes.sizes, config.batch, generator):
                loss = probes.loss(student, index, config.shift, generator)
                kept = torch.randint(len(task), (config.batch,), generator=generator)
                jitter = Jitter.draw(len(kept), config.shift, generator)
                loss = loss + task.loss(student, kept, jitter, task.weights)[0]
                descent.step(loss)
                losses.append(float(loss.detach()))
                stage.progress.advance(losses[-1])
            if epoch % _MEASURE_EVERY_EPOCHS == 0 or epoch == recipe.epochs:
                stage.measure(epoch * sum(probes.sizes), losses, student)
    stage.finish(**task.nets())


def _fresh_heads(student: Student, data: SeveralTasks, fit: Fit) -> None:
    """Every task's head is fitted to its labels; before any of them is, the features are taken."""
    chosen = np.linspace(0, len(data.transfer) - 1, min(_MAPS, len(data.transfer))).astype(int)
    # Maps of all images may be larger than the memory; the deviation of their cells needs no such many.
    many = Features(
        features_of(student, data.transfer[chosen]).map, pooled_features(student, data.transfer)
    )
    for name, task in data.tasks.items():
        own = features_of(student, task.probe.images)
        task.kind.refit(student.head(name), own, task.probe.labels, many, fit)
