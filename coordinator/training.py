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
from coordinator.amalgamation.answers import TeacherAnswers, ask
from coordinator.amalgamation.heads import fit_task_head
from coordinator.amalgamation.task import AmalgamationTask, Losses
from coordinator.checkpoints import CurvePoint, RoundSelection, Run
from coordinator.config import Config, ScratchConfig, WarmupConfig
from coordinator.data import TaskData
from coordinator.loop import Drawn, Lesson
from coordinator.optimisation import OneCycle, steps_per_epoch
from coordinator.parallel import in_parallel
from coordinator.progress import Progress, Silent
from coordinator.ranks import ALONE, Ranks
from coordinator.selection import Evidence, select
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


def train(
    config: Config,
    data: TaskData,
    teachers: Mapping[str, Teacher],
    folder: Path,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    tracking: Tracking = UNTRACKED,
) -> TrainingResult:
    """Train a student for `data` from `teachers`, keeping state in `folder`.

    Writes `folder`/checkpoint.pt after every stage and every `config.checkpoint_s` seconds within
    one, and `folder`/student.pt at the end. Raises
    UsageError without teachers or if `folder` holds another run, CheckFailed for an answer that
    makes no sense, and whatever a teacher raises. Of several processes, `ranks`, only the first writes;
    `teachers` are then those that all of them ask together.
    """
    if not teachers:
        raise UsageError("There is no teacher to learn from; start at least one device.")
    require_enough(config, len(teachers))
    progress = progress or Silent()
    require_shares(config, data, ranks)
    cores = max(1, len(os.sched_getaffinity(0)) // ranks.local_world)
    torch.set_num_threads(config.threads or cores)
    device = ranks.device(config.student.device)
    identities = {name: teacher.identity for name, teacher in teachers.items()}
    run = Run.open(folder, config, data, identities, ranks)
    tracking.begin(run.record.steps)
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

    teacher_maps = _saliency(stage("saliency"), teachers)
    answers: dict[str, TeacherAnswers] = {}
    task: AmalgamationTask | None = None
    for number in range(config.aggregation.rounds):
        round_stage = stage(f"round {number + 1}")
        if round_stage.resumed(student=student):
            continue
        if number % config.selection.every_rounds == 0 and not run.selected(number):
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
        student_maps=grad_cam(student, data.probe.images),
        teacher_maps=teacher_maps,
        curve=tuple(run.record.curve),
        accuracy=run.record.accuracy,
        seconds=run.record.seconds,
    )


def require_enough(config: Config, teachers: int) -> None:
    """Known before the baseline and the warm-up, not after. Raises UsageError."""
    if config.selection.strategy != "all" and config.selection.k > teachers:
        there = "is 1 teacher" if teachers == 1 else f"are {teachers} teachers"
        raise UsageError(
            f"selection.k is {config.selection.k} and there {there}; "
            "start more of them or choose a smaller k."
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


def _saliency(stage: Stage, teachers: Mapping[str, Teacher]) -> dict[str, NDArray[np.float32]]:
    """Where every teacher looks on the probe images; asked once, for teachers do not change."""
    names = sorted(teachers)
    probe = stage.data.probe.images
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
    stage: Stage,
    number: int,
    student: Student,
    teacher_maps: Mapping[str, NDArray[np.float32]],
) -> None:
    """Select for round `number` by where the student looks now."""
    config = stage.config
    with stage.run.timed(stage.name):
        evidence = Evidence(grad_cam(student, stage.data.probe.images), teacher_maps)
        rng = np.random.default_rng([config.seed, number])
        # One decides for all: machines that round differently could choose different teachers.
        selection = stage.ranks.first_does(
            lambda: select(config.selection.strategy, evidence, config.selection.k, rng)
        )
    stage.run.record.selections.append(RoundSelection(number, selection))
    weights = {f"selection/{name}": selection.weights.get(name, 0.0) for name in teacher_maps}
    stage.tracking.write(stage.run.record.steps, weights)
    shares = ", ".join(f"{name} ({weight:.2f})" for name, weight in selection.weights.items())
    stage.progress.say(f"Selected before round {number + 1}: {shares}")


def _task(
    stage: Stage,
    student: Student,
    teachers: Mapping[str, Teacher],
    answers: dict[str, TeacherAnswers],
) -> AmalgamationTask:
    """The task for the teachers selected last; `answers` keeps what was asked, for later rounds."""
    config, data = stage.config, stage.data
    weights = stage.run.record.selections[-1].selection.weights
    missing = [name for name in weights if name not in answers]
    stage.progress.begin(stage.name, len(missing))
    with stage.run.timed(stage.name):
        found = in_parallel(
            [teachers[name] for name in missing],
            lambda teacher: ask(
                teacher,
                data.probe.images,
                data.transfer,
                flips=config.aggregation.flips,
                maps=config.aggregation.hint_maps > 0,
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
            weights,
            stage.run.nets,
            config.aggregation,
            config.head,
            config.seed,
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
