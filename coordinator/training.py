"""A training run: warm up, select, aggregate, fine-tune; and the baseline it is judged by.

The order is the method's (Xie et al. 2022): the student is warmed up on the probe set, then for
some rounds learns from the teachers, selected again every so often as it changes, and at last gets
a fresh head that is trained on the probe set. Every stage that learns is a `Lesson` for the one
loop, which keeps the state on disk; a run that was interrupted, in whatever way, goes on from there
and ends with the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from coordinator.amalgamation.aggregation import RoundPlan, run_round
from coordinator.amalgamation.heads import fit_task_head
from coordinator.amalgamation.task import AmalgamationTask, Losses
from coordinator.checkpoints import CurvePoint, RoundSelection, Run
from coordinator.config import Config, ScratchConfig, WarmupConfig
from coordinator.consultation import Consultation
from coordinator.data import LabelledImages, TaskData
from coordinator.loop import Drawn, Lesson
from coordinator.optimisation import OneCycle, steps_per_epoch
from coordinator.progress import Progress, Silent
from coordinator.ranks import ALONE, Ranks
from coordinator.roster import Lost, Online, Roster
from coordinator.stage import Stage
from coordinator.student import (
    Student,
    StudentSpec,
    accuracy,
    grad_cam,
    pooled_features,
    save_student,
)
from coordinator.teachers import Teacher
from coordinator.tracking import UNTRACKED, Tracking
from edge_teacher.contract.errors import UsageError


@dataclass(frozen=True)
class TrainingResult:
    """What came out of a run.

    student_maps [P, s, s] and teacher_maps {name: [P, S, S]} are of `looked_at`, the student's
    as it is at the end; accuracies are fractions of the test set, absent without one; seconds are
    by stage.
    """

    student: Student
    scratch: Student | None
    selections: tuple[RoundSelection, ...]
    looked_at: LabelledImages
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
    ranks: Ranks = ALONE,
    tracking: Tracking = UNTRACKED,
) -> TrainingResult:
    """Train a student for `data` from `teachers`, keeping state in `folder`.

    Writes `folder`/checkpoint.pt after every stage and every `config.checkpoint_s` seconds within
    one, and `folder`/student.pt at the end. A teacher that does not answer, or not with what makes
    sense, is set aside, and the run goes on with the others; `online` says who is there, so that one
    that has come back is asked again at the next selection. Of several processes, `ranks`, only the
    first writes; `teachers` are then those that all of them ask together. Raises UsageError without
    teachers or if `folder` holds another run, and CheckFailed, naming everyone who was set aside,
    when fewer than `devices.least` are left.
    """
    if not teachers:
        raise UsageError("There is no teacher to learn from; start at least one device.")
    progress = progress or Silent()
    require_shares(config, data, ranks)
    cores = max(1, len(os.sched_getaffinity(0)) // ranks.local_world)
    torch.set_num_threads(config.threads or cores)
    device = ranks.device(config.student.device)
    identities = {name: teacher.identity for name, teacher in teachers.items()}
    run = Run.open(folder, config, data, identities, ranks)
    tracking.begin(run.record.steps)
    require_enough(config, len(run.record.teachers))
    see = online or (lambda: identities)
    roster = Roster(
        teachers,
        run.record.lost,
        progress,
        least=config.devices.least,
        # The first process says for all who is there: they must set the same ones aside.
        online=lambda: ranks.first_does(see),
        keep=run.save,
    )
    spec = StudentSpec.of_images(
        data.transfer,
        data.probe.classes,
        config.student.channels,
        architecture=config.student.architecture,
        module=config.student.module,
        feature_layer=config.student.feature_layer,
    )

    def stage(name: str) -> Stage:
        return Stage(name, config, data, run, progress, ranks, tracking)

    scratch = _new_student(spec, config.seed).to(device)
    if config.scratch.epochs:
        _learn_labels(stage("scratch"), "scratch", scratch, config.scratch)

    # The same first weights as the baseline's: what differs in the end is what the teachers gave.
    student = _new_student(spec, config.seed).to(device)
    _learn_labels(stage("warm-up"), "student", student, config.warmup)

    consultation = Consultation(config, data, run, roster, progress, ranks, tracking)
    consultation.open()
    task: AmalgamationTask | None = None
    for number in range(config.aggregation.rounds):
        round_stage = stage(f"round {number + 1}")
        if round_stage.resumed(student=student):
            continue
        if number % config.selection.every_rounds == 0 and not run.selected(number):
            consultation.select(number, student)
            task = None
        if task is None:
            task = _task(round_stage, student, consultation, number)
        _aggregate(round_stage, number, task)

    if config.finetune.epochs:
        finetune = stage("fine-tune")
        if not finetune.resumed(student=student):
            if task is None:
                task = _task(finetune, student, consultation, config.aggregation.rounds)
            _fine_tune(finetune, task)

    roster.roll_call("end")
    student.eval()
    scratch.eval()
    if ranks.first:
        save_student(student, folder / "student.pt")
    trained = {"fedsa": student} | ({"scratch": scratch} if config.scratch.epochs else {})
    if data.test is not None:
        for name, net in trained.items():
            run.record.accuracy[name] = accuracy(net, data.test.images, data.test.labels)
    return TrainingResult(
        student=student,
        scratch=trained.get("scratch"),
        selections=tuple(run.record.selections),
        looked_at=consultation.images,
        student_maps=grad_cam(student, consultation.images.images),
        teacher_maps=consultation.teacher_maps,
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


def require_shares(config: Config, data: TaskData, ranks: Ranks) -> None:
    """Every process needs two images of every step: batch norm has a variance. Raises UsageError."""
    if ranks.alone:
        return
    if config.batch % ranks.world or config.batch < 2 * ranks.world:
        raise UsageError(
            f"batch is {config.batch}, which {ranks.world} processes cannot share equally, two images "
            f"each at least; choose a multiple of {ranks.world} from {2 * ranks.world} on."
        )
    if len(data.probe) < 2 * ranks.world:
        raise UsageError(
            f"the probe set has {len(data.probe)} images and {ranks.world} processes need two each; "
            "start fewer."
        )


def _new_student(spec: StudentSpec, seed: int) -> Student:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Student(spec)


def _learn_labels(
    stage: Stage, key: str, student: Student, recipe: WarmupConfig | ScratchConfig
) -> None:
    """Cross-entropy on the probe set, from whatever `student` is."""
    if stage.resumed(**{key: student}):
        return
    config, probe = stage.config, stage.data.probe
    images, labels = torch.from_numpy(probe.images), torch.from_numpy(probe.labels)

    def draw(index: Tensor, generator: torch.Generator) -> tuple[Drawn, ...]:
        return (stage.drawn(index, generator),)

    def loss(drawn: Drawn) -> tuple[Tensor, Losses]:
        logits = student(drawn.jitter.images(images[drawn.index]))
        value = F.cross_entropy(logits, labels[drawn.index].to(logits.device))
        return value, Losses(float(value.detach()))

    steps = recipe.epochs * steps_per_epoch(len(probe), config.batch)
    lesson = Lesson(
        name=stage.name,
        nets={key: student},
        trained=[student],
        images=len(probe),
        epochs=recipe.epochs,
        cycle=OneCycle(recipe.rate, steps),
        draw=draw,
        loss=loss,
        measure=lambda epoch: stage.measure(epoch * len(probe), student),
    )
    with stage.run.timed(stage.name):
        stage.learn(lesson, stage.generator())
    stage.finish(**{key: student})


def _task(
    stage: Stage, student: Student, consultation: Consultation, number: int
) -> AmalgamationTask:
    """The task for the teachers selected last."""
    weights = consultation.ask(number, student)
    with stage.run.timed("head"):
        task = AmalgamationTask(
            student,
            stage.data,
            consultation.answers,
            weights,
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


def _aggregate(stage: Stage, number: int, task: AmalgamationTask) -> None:
    config = stage.config
    steps = config.aggregation.epochs * steps_per_epoch(len(task), config.batch)
    plan = RoundPlan(
        name=stage.name,
        number=number,
        epochs=config.aggregation.epochs,
        batch=config.batch,
        shift=config.shift,
        cycle=OneCycle(config.aggregation.rate, steps * config.aggregation.rounds),
    )
    random = stage.generator()

    def learn(lesson: Lesson) -> None:
        part = lesson.name != stage.name
        if part and stage.run.has(lesson.name):
            for key, net in lesson.nets.items():
                net.load_state_dict(stage.run.nets[key])
            random.set_state(stage.run.random[lesson.name])
            return
        stage.learn(lesson, random)
        if part:
            states = {key: net.state_dict() for key, net in lesson.nets.items()}
            stage.run.finish(lesson.name, states, random.get_state())

    with stage.run.timed("aggregate"):
        run_round(task, plan, learn)
        stage.measure((number + 1) * len(task) * config.aggregation.epochs, task.student)
    stage.run.forget_parts(stage.name)
    stage.finish(**task.nets())


def _fine_tune(stage: Stage, task: AmalgamationTask) -> None:
    """A fresh head, then all of the student at a low rate, on the labels of the probe set.

    The head is fitted like a task head, to features that hold still, and so does no harm to them.
    Every step also keeps up the aggregation's loss on as many transfer images: fifty images of a
    class would else have the student forget what thousands taught it.
    """
    config, probe = stage.config, stage.data.probe
    student = task.student
    recipe = config.finetune
    images, labels = torch.from_numpy(probe.images), torch.from_numpy(probe.labels)

    def prepare() -> None:
        fitted = fit_task_head(
            pooled_features(student, probe.images),
            probe.labels,
            len(probe.classes),
            pooled_features(student, stage.data.transfer),
            config.head.folds,
            config.seed,
        )
        fitted.write_to(student.head)

    def draw(index: Tensor, generator: torch.Generator) -> tuple[Drawn, ...]:
        labelled = stage.drawn(index, generator)
        kept = torch.randint(len(task), (config.batch,), generator=generator)
        return labelled, stage.drawn(kept, generator)

    def loss(labelled: Drawn, kept: Drawn) -> tuple[Tensor, Losses]:
        logits = student(labelled.jitter.images(images[labelled.index]))
        value = F.cross_entropy(logits, labels[labelled.index].to(logits.device))
        value = value + task.loss(student, kept.index, kept.jitter, task.weights)[0]
        return value, Losses(float(value.detach()))

    steps = recipe.epochs * steps_per_epoch(len(probe), config.batch)
    lesson = Lesson(
        name=stage.name,
        nets=task.nets(),
        trained=[student, *task.translators(task.weights).values()],
        images=len(probe),
        epochs=recipe.epochs,
        cycle=OneCycle(recipe.rate, steps),
        draw=draw,
        loss=loss,
        prepare=prepare,
        measure=lambda epoch: stage.measure(epoch * len(probe), student),
    )
    with stage.run.timed(stage.name):
        stage.learn(lesson, stage.generator())
    stage.finish(**task.nets())
