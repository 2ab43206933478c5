"""A training run: warm up, select, aggregate, fine-tune; and the baseline it is judged by.

The order is the method's (Xie et al. 2022): the student is warmed up on the probe set, then for
some rounds learns from the teachers, selected again every so often as it changes, and at last gets
a fresh head that is trained on the probe set. The state is on disk after every stage; a run that
was interrupted goes on from the last finished one and ends with the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from coordinator.amalgamation.aggregation import RoundPlan, run_round
from coordinator.amalgamation.answers import TeacherAnswers, ask
from coordinator.amalgamation.heads import fit_task_head
from coordinator.amalgamation.task import AmalgamationTask, Losses
from coordinator.answers.checks import check_saliency
from coordinator.augmentation import Jitter
from coordinator.checkpoints import CurvePoint, RoundSelection, Run
from coordinator.config import Config, ScratchConfig, WarmupConfig
from coordinator.data import TaskData
from coordinator.optimisation import (
    Descent,
    OneCycle,
    shuffled_batches,
    stage_generator,
    steps_per_epoch,
)
from coordinator.progress import Progress, Silent
from coordinator.roster import Lost, Online, Roster
from coordinator.selection import Evidence, select
from coordinator.student import (
    Student,
    StudentSpec,
    accuracy,
    grad_cam,
    pooled_features,
    save_student,
)
from coordinator.teachers import Teacher
from edge_teacher.contract.errors import UsageError

_MEASURE_EVERY_EPOCHS = 5


@dataclass(frozen=True)
class TrainingResult:
    """What came out of a run.

    student_maps [P, s, s] and teacher_maps {name: [P, S, S]} are of the probe images, the student's
    as it is at the end; accuracies are fractions of the test set, absent without one; seconds are
    by stage.
    """

    student: Student
    scratch: Student | None
    selections: tuple[RoundSelection, ...]
    student_maps: NDArray[np.float32]
    teacher_maps: Mapping[str, NDArray[np.float32]]
    curve: tuple[CurvePoint, ...]
    accuracy: Mapping[str, float]
    seconds: Mapping[str, float]
    lost: tuple[Lost, ...] = ()


def train(
    config: Config,
    data: TaskData,
    teachers: Mapping[str, Teacher],
    folder: Path,
    progress: Progress | None = None,
    online: Online | None = None,
) -> TrainingResult:
    """Train a student for `data` from `teachers`, keeping state in `folder`.

    Writes `folder`/checkpoint.pt after every stage, and `folder`/student.pt at the end. A teacher
    that does not answer, or not with what makes sense, is set aside, and the run goes on with the
    others; `online` says who is there, so that one that has come back is asked again at the next
    selection. Raises UsageError without teachers or if `folder` holds another run, and CheckFailed,
    naming everyone who was set aside, when fewer than `devices.least` are left.
    """
    if not teachers:
        raise UsageError("There is no teacher to learn from; start at least one device.")
    progress = progress or Silent()
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    run = Run.open(folder, config, data, {name: t.identity for name, t in teachers.items()})
    require_enough(config, len(run.record.teachers))
    roster = Roster(
        teachers,
        run.record.lost,
        progress,
        least=config.devices.least,
        online=online,
        keep=run.save,
    )
    spec = StudentSpec.of_images(data.transfer, data.probe.classes, config.student.channels)

    def stage(name: str) -> _Stage:
        return _Stage(name, config, data, run, progress)

    scratch = _new_student(spec, config.seed)
    if config.scratch.epochs:
        _learn_labels(stage("scratch"), "scratch", scratch, config.scratch)

    # The same first weights as the baseline's: what differs in the end is what the teachers gave.
    student = _new_student(spec, config.seed)
    _learn_labels(stage("warm-up"), "student", student, config.warmup)

    teacher_maps: dict[str, NDArray[np.float32]] = {}
    _saliency(stage("saliency"), roster, teacher_maps)
    answers: dict[str, TeacherAnswers] = {}
    task: AmalgamationTask | None = None
    for number in range(config.aggregation.rounds):
        round_stage = stage(f"round {number + 1}")
        if round_stage.resumed(student=student):
            continue
        if number % config.selection.every_rounds == 0:
            _welcome_back(stage("saliency"), number, roster, teacher_maps)
            _select(stage("select"), number, student, roster, teacher_maps)
            task = None
        if task is None:
            _ask(stage("ask"), number, student, roster, teacher_maps, answers)
            task = _task(stage("ask"), student, answers)
        _aggregate(round_stage, number, task)

    if config.finetune.epochs:
        finetune = stage("fine-tune")
        if not finetune.resumed(student=student):
            if task is None:
                last = config.aggregation.rounds
                _ask(stage("ask"), last, student, roster, teacher_maps, answers)
                task = _task(stage("ask"), student, answers)
            _fine_tune(finetune, task)

    roster.roll_call("end")
    student.eval()
    scratch.eval()
    save_student(student, folder / "student.pt")
    trained = {"fedsa": student} | ({"scratch": scratch} if config.scratch.epochs else {})
    if data.test is not None:
        for name, net in trained.items():
            run.record.accuracy[name] = accuracy(net, data.test.images, data.test.labels)
    return TrainingResult(
        student=student,
        scratch=trained.get("scratch"),
        selections=tuple(run.record.selections),
        student_maps=grad_cam(student, data.probe.images),
        teacher_maps=teacher_maps,
        curve=tuple(run.record.curve),
        accuracy=run.record.accuracy,
        seconds=run.record.seconds,
        lost=tuple(run.record.lost),
    )


def require_enough(config: Config, teachers: int) -> None:
    """Known before the baseline and the warm-up, not after. Raises UsageError."""
    if config.selection.strategy != "all" and config.selection.k > teachers:
        there = "is 1 teacher" if teachers == 1 else f"are {teachers} teachers"
        raise UsageError(
            f"selection.k is {config.selection.k} and there {there}; "
            "start more of them or choose a smaller k."
        )
    if config.devices.least > teachers:
        raise UsageError(
            f"devices.least is {config.devices.least}, and {teachers} teachers are there; "
            "start more of them or choose a smaller number."
        )


@dataclass(frozen=True)
class _Stage:
    """One stage of the run, and what every stage needs."""

    name: str
    config: Config
    data: TaskData
    run: Run
    progress: Progress

    def resumed(self, **nets: nn.Module) -> bool:
        """Whether an earlier run finished this stage; then the nets are as it left them."""
        if not self.run.has(self.name):
            return False
        for key, net in nets.items():
            net.load_state_dict(self.run.nets[key])
        return True

    def named(self, name: str) -> _Stage:
        """Another stage of the same run."""
        return replace(self, name=name)

    def finish(self, **nets: nn.Module) -> None:
        self.progress.end()
        self.run.finish(self.name, {key: net.state_dict() for key, net in nets.items()})

    def generator(self) -> torch.Generator:
        return stage_generator(self.config.seed, self.name)

    def measure(self, images: int, losses: list[float], student: Student) -> None:
        """Add a point to the learning curve. The test set is for reports: nothing depends on it."""
        test = self.data.test
        reached = accuracy(student, test.images, test.labels) if test else None
        loss = float(np.mean(losses))
        self.run.record.curve.append(CurvePoint(self.name, images, loss, reached))
        losses.clear()


def _new_student(spec: StudentSpec, seed: int) -> Student:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Student(spec)


def _learn_labels(
    stage: _Stage, key: str, student: Student, recipe: WarmupConfig | ScratchConfig
) -> None:
    """Cross-entropy on the probe set, from whatever `student` is."""
    if stage.resumed(**{key: student}):
        return
    config, probe = stage.config, stage.data.probe
    images, labels = torch.from_numpy(probe.images), torch.from_numpy(probe.labels)
    generator = stage.generator()
    epochs = recipe.epochs
    steps = epochs * steps_per_epoch(len(probe), config.batch)
    descent = Descent([student], OneCycle(recipe.rate, steps), config.weight_decay)
    stage.progress.begin(stage.name, steps)
    losses: list[float] = []
    student.train()
    with stage.run.timed(stage.name):
        for epoch in range(1, epochs + 1):
            for index in shuffled_batches(len(probe), config.batch, generator):
                jitter = Jitter.draw(len(index), config.shift, generator)
                loss = F.cross_entropy(student(jitter.images(images[index])), labels[index])
                descent.step(loss)
                losses.append(float(loss.detach()))
                stage.progress.advance(losses[-1])
            if epoch % _MEASURE_EVERY_EPOCHS == 0 or epoch == epochs:
                stage.measure(epoch * len(probe), losses, student)
    stage.finish(**{key: student})


def _saliency(stage: _Stage, roster: Roster, teacher_maps: dict[str, NDArray[np.float32]]) -> None:
    """Where every teacher looks on the probe images; asked once, for teachers do not change.

    Who was set aside by an earlier session has another chance.
    """
    _look(stage, roster, {*roster.present, *roster.returned()}, stage.name, teacher_maps)


def _welcome_back(
    stage: _Stage, number: int, roster: Roster, teacher_maps: dict[str, NDArray[np.float32]]
) -> None:
    """Before a selection, ask those again who have come back."""
    back = set(roster.returned())
    # The first selection comes right after everyone was asked.
    if number and back:
        _look(stage, roster, back, f"saliency before round {number + 1}", teacher_maps)


def _look(
    stage: _Stage,
    roster: Roster,
    names: set[str],
    words: str,
    teacher_maps: dict[str, NDArray[np.float32]],
) -> None:
    probe = stage.data.probe.images
    stage.progress.begin(stage.name, len(names))
    with stage.run.timed(stage.name):
        found = roster.ask(
            names,
            lambda teacher: check_saliency(teacher.name, teacher.saliency(probe), len(probe)),
            words,
            stage.progress.advance,
        )
    teacher_maps.update(found)
    stage.progress.end()


def _select(
    stage: _Stage,
    number: int,
    student: Student,
    roster: Roster,
    teacher_maps: Mapping[str, NDArray[np.float32]],
) -> None:
    """Select for round `number`, among those who can be asked, by where the student looks now."""
    config = stage.config
    there = {name: teacher_maps[name] for name in roster.present}
    k = config.selection.k
    if config.selection.strategy != "all" and k > len(there):
        k = len(there)
        stage.progress.say(f"selection.k is {config.selection.k}, and {k} can be asked: k is {k}")
    with stage.run.timed(stage.name):
        evidence = Evidence(grad_cam(student, stage.data.probe.images), there)
        rng = np.random.default_rng([config.seed, number])
        selection = select(config.selection.strategy, evidence, k, rng)
    record = stage.run.record
    # One made before somebody selected was lost was never used.
    record.selections = [s for s in record.selections if s.round != number]
    record.selections.append(RoundSelection(number, selection))
    shares = ", ".join(f"{name} ({weight:.2f})" for name, weight in selection.weights.items())
    stage.progress.say(f"Selected before round {number + 1}: {shares}")


def _ask(
    stage: _Stage,
    number: int,
    student: Student,
    roster: Roster,
    teacher_maps: Mapping[str, NDArray[np.float32]],
    answers: dict[str, TeacherAnswers],
) -> None:
    """Ask those selected last, and select again without those who fail, until all have answered.

    `answers` keeps what was asked, for later rounds.
    """
    config, data = stage.config, stage.data
    while True:
        weights = stage.run.record.selections[-1].selection.weights
        missing = [name for name in weights if name not in answers]
        asked = set(missing) & set(roster.present)
        stage.progress.begin(stage.name, len(asked))
        with stage.run.timed(stage.name):
            found = roster.ask(
                asked,
                lambda teacher: ask(
                    teacher,
                    data.probe.images,
                    data.transfer,
                    flips=config.aggregation.flips,
                    maps=config.aggregation.hint_maps > 0,
                ),
                f"features before round {number + 1}",
                stage.progress.advance,
            )
        answers.update(found)
        stage.progress.end()
        gone = [name for name in weights if name not in answers]
        if not gone:
            return
        roster.replaced(gone)
        _select(stage.named("select"), number, student, roster, teacher_maps)


def _task(
    stage: _Stage, student: Student, answers: Mapping[str, TeacherAnswers]
) -> AmalgamationTask:
    """The task for the teachers selected last."""
    with stage.run.timed("head"):
        task = AmalgamationTask(
            student,
            stage.data,
            answers,
            stage.run.record.selections[-1].selection.weights,
            stage.run.nets,
            stage.config.aggregation,
            stage.config.head,
            stage.config.seed,
        )
    if task.head is not None:
        stage.progress.say(
            f"A linear head on their features is right on {task.head.cv_accuracy:.1%} "
            "of the probe images, in cross-validation"
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
    config, probe = stage.config, stage.data.probe
    student = task.student
    recipe = config.finetune
    images, labels = torch.from_numpy(probe.images), torch.from_numpy(probe.labels)
    generator = stage.generator()
    steps = recipe.epochs * steps_per_epoch(len(probe), config.batch)
    stage.progress.begin(stage.name, steps)
    losses: list[float] = []
    with stage.run.timed(stage.name):
        fitted = fit_task_head(
            pooled_features(student, probe.images),
            probe.labels,
            len(probe.classes),
            pooled_features(student, stage.data.transfer),
            config.head.folds,
            config.seed,
        )
        fitted.write_to(student.head)
        student.train()
        modules = [student, *task.translators(task.weights)]
        descent = Descent(modules, OneCycle(recipe.rate, steps), config.weight_decay)
        for epoch in range(1, recipe.epochs + 1):
            for index in shuffled_batches(len(probe), config.batch, generator):
                jitter = Jitter.draw(len(index), config.shift, generator)
                loss = F.cross_entropy(student(jitter.images(images[index])), labels[index])
                kept = torch.randint(len(task), (config.batch,), generator=generator)
                jitter = Jitter.draw(len(kept), config.shift, generator)
                loss = loss + task.loss(student, kept, jitter, task.weights)[0]
                descent.step(loss)
                losses.append(float(loss.detach()))
                stage.progress.advance(losses[-1])
            if epoch % _MEASURE_EVERY_EPOCHS == 0 or epoch == recipe.epochs:
                stage.measure(epoch * len(probe), losses, student)
    stage.finish(**task.nets())
