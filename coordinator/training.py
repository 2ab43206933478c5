"""A training run: warm up, select, aggregate, fine-tune; and the baseline it is judged by.

The order is the method's (Xie et al. 2022): the student is warmed up on the probe set, then for
some rounds learns from the teachers, selected again every so often as it changes, and at last gets
a fresh head that is trained on the probe set. Every stage that learns is a `Lesson` for the one
loop, which keeps the state on disk; a run that was interrupted, in whatever way, goes on from there
and ends with the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.adaptation import Adaptation, hold_out
from coordinator.adapted import Adapted, in_words
from coordinator.amalgamation.aggregation import RoundPlan, run_round
from coordinator.amalgamation.agreement import agreements
from coordinator.amalgamation.task import AmalgamationTask, Losses
from coordinator.augmentation import with_views
from coordinator.checkpoints import AGREEMENT, COPY, CurvePoint, RoundSelection, Run
from coordinator.config import AggregationConfig, Config, ScratchConfig, WarmupConfig
from coordinator.consultation import Consultation
from coordinator.data import SeveralTasks, TaskData, as_several
from coordinator.kinds.kind import Features, Fit
from coordinator.labels import Probes
from coordinator.loop import Drawn, Lesson
from coordinator.measures import first_metric, measured
from coordinator.optimisation import OneCycle, joint_steps, stage_generator, steps_per_epoch
from coordinator.progress import Progress, Silent
from coordinator.ranks import ALONE, Ranks
from coordinator.roster import Lost, Online, Roster
from coordinator.selection import Selection
from coordinator.stage import Stage
from coordinator.student import (
    HeadSpec,
    Student,
    StudentSpec,
    features_of,
    pooled_features,
    save_student,
)
from coordinator.teachers import Teacher
from coordinator.tracking import UNTRACKED, Tracking
from edge_teacher.contract.errors import UsageError

_MAPS = 500
# No score is told of it: the student has learnt the labels that any fold of them would be held out of.
_REFITTED = "The task head was fitted again, on the student's own features too"


@dataclass(frozen=True)
class TrainingResult:
    """What came out of a run.

    student_maps [P, s, s] and teacher_maps {name: [P, S, S]} are of the probe images of `looked_at`, one
    task's after the other's, the student's as it is at the end. Accuracies are the first metric of the
    task's kind on the test set, with several tasks the mean over those that have one, absent without
    any; `metrics` has every metric by net, task and name. Seconds are by stage.
    `about` says what each teacher is, gone ones too; `learnt` what the hints of each weighed at last, where
    that is learnt; `adapted` which weights the fine-tuning ended with, where that was to choose.
    """

    data: SeveralTasks

    student: Student
    scratch: Student | None
    selections: tuple[RoundSelection, ...]
    looked_at: SeveralTasks
    student_maps: NDArray[np.float32]
    teacher_maps: Mapping[str, NDArray[np.float32]]
    curve: tuple[CurvePoint, ...]
    accuracy: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]
    seconds: Mapping[str, float]
    lost: tuple[Lost, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    learnt: Mapping[str, float] = field(default_factory=dict)
    adapted: Adapted | None = None

    def last_selections(self) -> dict[str, Selection]:
        """By task."""
        return {found.task: found.selection for found in self.selections}


def train(
    config: Config,
    data: TaskData | SeveralTasks,
    teachers: Mapping[str, Teacher],
    folder: Path,
    progress: Progress | None = None,
    online: Online | None = None,
    ranks: Ranks = ALONE,
    tracking: Tracking = UNTRACKED,
    about: Mapping[str, str] | None = None,
    accepted: Callable[[], None] = lambda: None,
) -> TrainingResult:
    """Train a student for `data`, one task or several, from `teachers`, keeping state in `folder`.

    Writes `folder`/checkpoint.pt after every stage and every `config.checkpoint_s` seconds within
    one, and `folder`/student.pt at the end. A teacher that does not answer, or not with what makes
    sense, or that is missing when a run is gone on with, is set aside, and the run goes on with the
    others; `online` says who is there, so that one that has come back is asked again at the next
    selection. Raises UsageError without teachers or if `folder` holds another run, and CheckFailed,
    naming everyone who was set aside, when fewer than `devices.least` are left. Of several processes,
    `ranks`, only the first writes and decides who is there; `teachers` are then those that all of them
    ask together. `about`: what each teacher is, in words, for the report. `accepted` is called once it
    is certain that `folder` is for this very run.
    """
    if not teachers:
        raise UsageError("There is no teacher to learn from; start at least one device.")
    progress = progress or Silent()
    tasks = as_several(data)
    if config.aggregation.views:
        random = stage_generator(config.seed, "views")
        views = with_views(tasks.transfer, config.aggregation.views, config.shift, random)
        tasks = replace(tasks, transfer=views)
    learnt, held = hold_out(tasks, config.finetune.held_out, config.seed)
    require_judgeable(config, tasks)
    require_shares(config, learnt, ranks)
    cores = max(1, len(os.sched_getaffinity(0)) // ranks.local_world)
    torch.set_num_threads(config.threads or cores)
    device = ranks.device(config.student.device)
    identities = {name: teacher.identity for name, teacher in teachers.items()}
    run = Run.open(folder, config, tasks, identities, ranks, about)
    require_enough(config, len(run.record.teachers))
    accepted()
    tracking.begin(run.record.steps)
    there = online or (lambda: identities)
    roster = Roster(
        teachers,
        run.record.lost,
        progress,
        least=config.devices.least,
        # One says who is there, for all: the others hear of a device earlier or later.
        online=lambda: ranks.first_does(there),
        keep=run.save,
    )
    roster.missing(run.record.teachers)
    spec = student_spec(config, tasks)

    def stage(name: str, of: SeveralTasks = learnt) -> Stage:
        return Stage(name, config, of, run, progress, ranks, tracking)

    scratch = _new_student(spec, config.seed).to(device)
    if config.scratch.epochs:
        # It chooses nothing, and so has no need to hold labels out.
        _learn_labels(stage("scratch", tasks), "scratch", scratch, config.scratch)

    # The same first weights as the baseline's: what differs in the end is what the teachers gave.
    student = _new_student(spec, config.seed).to(device)
    _learn_labels(stage("warm-up"), "student", student, config.warmup)

    consultation = Consultation(config, learnt, run, roster, progress, ranks, tracking)
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
        if number in refits_before(config.aggregation):
            _refit(stage(_refit_name(number)), task)
        _aggregate(round_stage, number, task)

    if config.finetune.epochs:
        finetune = stage("fine-tune")
        if not finetune.resumed(student=student):
            if task is None:
                task = _task(finetune, student, consultation, config.aggregation.rounds)
            _fine_tune(finetune, task, held)

    roster.roll_call("end")
    student.eval()
    scratch.eval()
    if ranks.first:
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
        looked_at=consultation.looked,
        student_maps=consultation.student_maps(student),
        teacher_maps=consultation.teacher_maps,
        curve=tuple(run.record.curve),
        accuracy=run.record.accuracy,
        metrics=run.record.metrics,
        seconds=run.record.seconds,
        lost=tuple(run.record.lost),
        about=dict(run.record.about),
        learnt=dict(run.record.learnt),
        adapted=run.record.adapted,
    )


def student_spec(config: Config, data: SeveralTasks) -> StudentSpec:
    """Of the student that a run with these settings trains."""
    return StudentSpec.of_images(
        data.transfer,
        {name: HeadSpec(task.probe.kind, task.classes) for name, task in data.tasks.items()},
        config.student.channels,
        architecture=config.student.architecture,
        module=config.student.module,
        feature_layer=config.student.feature_layer,
    )


def require_enough(config: Config, teachers: int) -> None:
    """Known before the baseline and the warm-up, not after. Raises UsageError."""
    there = "is 1 teacher" if teachers == 1 else f"are {teachers} teachers"
    if config.selection.strategy != "all" and config.selection.k > teachers:
        raise UsageError(
            f"selection.k is {config.selection.k} and there {there}; "
            "start more of them or choose a smaller k."
        )
    if config.devices.least > teachers:
        raise UsageError(
            f"devices.least is {config.devices.least}, and there {there}; "
            "start more of them or choose a smaller number."
        )


def require_judgeable(config: Config, data: SeveralTasks) -> None:
    """The oracle judges sets by a classifier's accuracy on test images. Raises UsageError if it cannot."""
    if config.selection.strategy != "oracle":
        return
    for name, task in data.tasks.items():
        if task.probe.kind != "single-label":
            raise UsageError(
                f"The oracle judges by accuracy, and the task {name} is {task.probe.kind}; choose another "
                "selection.strategy."
            )
        if task.test is None:
            raise UsageError(
                f"The oracle judges by labelled test images, and the task {name} has none: give them "
                "(data.test), or choose another selection.strategy."
            )


def require_shares(config: Config, data: SeveralTasks, ranks: Ranks) -> None:
    """Every process needs two images of every step: batch norm has a variance. Raises UsageError."""
    if ranks.alone:
        return
    if config.batch % ranks.world or config.batch < 2 * ranks.world:
        raise UsageError(
            f"batch is {config.batch}, which {ranks.world} processes cannot share equally, two images "
            f"each at least; choose a multiple of {ranks.world} from {2 * ranks.world} on."
        )
    for name, task in data.tasks.items():
        if len(task.probe) < 2 * ranks.world:
            of_task = f" of {name}" if len(data.tasks) > 1 else ""
            raise UsageError(
                f"the probe set{of_task} has {len(task.probe)} images and {ranks.world} processes need "
                "two each; start fewer."
            )


def _new_student(spec: StudentSpec, seed: int) -> Student:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Student(spec)


def _learn_labels(
    stage: Stage, key: str, student: Student, recipe: WarmupConfig | ScratchConfig
) -> None:
    """The tasks' losses on their probe sets, from whatever `student` is."""
    if stage.resumed(**{key: student}):
        return
    config = stage.config
    probes = Probes(stage.data)

    def draw(batches: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Drawn, ...]:
        return tuple(stage.drawn(index, generator) for index in batches)

    def loss(*drawn: Drawn) -> tuple[Tensor, Losses]:
        value = probes.loss(student, drawn)
        return value, Losses(float(value.detach()))

    steps = recipe.epochs * joint_steps(probes.sizes, config.batch)
    lesson = Lesson(
        name=stage.name,
        nets={key: student},
        trained=[student],
        images=probes.sizes,
        epochs=recipe.epochs,
        cycle=OneCycle(recipe.rate, steps),
        draw=draw,
        loss=loss,
        measure=lambda epoch: stage.measure(epoch * sum(probes.sizes), student),
    )
    with stage.run.timed(stage.name):
        stage.learn(lesson, stage.generator())
    stage.finish(**{key: student})


def _task(
    stage: Stage, student: Student, consultation: Consultation, number: int
) -> AmalgamationTask:
    """The task for the teachers selected last."""
    data = stage.data
    selected = consultation.ask(number, student)
    agreement = _agreement(stage, student, consultation, selected)
    with stage.run.timed("head"):
        task = AmalgamationTask(
            student,
            data,
            consultation.answers,
            selected,
            stage.run.nets,
            stage.config.aggregation,
            stage.config.head,
            stage.config.seed,
            agreement,
        )
    _go_on_refitted(stage, task, number)
    return task


def _agreement(
    stage: Stage,
    student: Student,
    consultation: Consultation,
    selected: Mapping[str, Mapping[str, float]],
) -> dict[str, Tensor]:
    """What the hints of those selected count by image, by the student as it was when they were."""
    if not stage.config.aggregation.agreement:
        return {}
    run = stage.run
    place = run.record.selections[-1].round + 1
    names = sorted({name for weights in selected.values() for name in weights})
    keys = {name: f"{AGREEMENT}{name} before round {place}" for name in names}
    missing = [name for name in names if keys[name] not in run.nets]
    if missing:
        with run.timed("agreement"):
            # One for all: machines that round differently would see other maps.
            found = stage.ranks.first_does(
                lambda: agreements(student, stage.data, consultation.answers, selected, missing)
            )
        known = {keys[n]: run.nets[keys[n]] for n in names if n not in found}
        run.keep_agreement(known | {keys[name]: {"each": found[name]} for name in missing})
    return {name: run.nets[key]["each"] for name, key in keys.items()}


def _go_on_refitted(stage: Stage, task: AmalgamationTask, number: int) -> None:
    """Once the heads were fitted again, those for other teachers are too, with the student of now.

    Unless all of them are right afterwards.
    """
    run = stage.run
    due = number in refits_before(stage.config.aggregation) and not run.has(_refit_name(number))
    if not due and any(map(run.has, map(_refit_name, range(number + 1)))) and task.unsaved:
        with run.timed("head"):
            task.refit(task.unsaved)
        _keep_refitted(run, task, task.unsaved)
        # By the student as it is before the round: a run that is killed within it has another.
        run.save()
    known = run.record.refitted
    if known and all(key in known for key in task.targets.values()):
        for name, key in task.targets.items():
            task.taught[name] = replace(task.taught[name], score=known[key])
        stage.progress.say(_REFITTED)
    else:
        _say_scores(stage, task)


def _keep_refitted(run: Run, task: AmalgamationTask, names: Iterable[str]) -> None:
    nets = task.nets()
    keys = {task.targets[name]: name for name in names}
    run.keep_refitted(
        {key: task.taught[name].score for key, name in keys.items()},
        {key: nets[key].state_dict() for key in keys},
    )


def _refit_name(number: int) -> str:
    return f"refit before round {number + 1}"


def refits_before(config: AggregationConfig) -> set[int]:
    """The rounds, counted from 0, before which the task heads are fitted again; evenly spread."""
    every = config.refits + 1
    return {config.rounds * part // every for part in range(1, every)} - {0}


def _refit(stage: Stage, task: AmalgamationTask) -> None:
    if stage.resumed():
        return
    with stage.run.timed("head"):
        task.refit()
    stage.progress.say(_REFITTED)
    stage.run.forget_targets(task.targets.values())
    _keep_refitted(stage.run, task, task.targets)
    stage.finish(**task.nets())


def _say_scores(stage: Stage, task: AmalgamationTask) -> None:
    for name, taught in task.taught.items():
        metric = stage.data.tasks[name].kind.metrics[0].replace("_", " ")
        of_task = f" for {name}" if len(stage.data.tasks) > 1 else ""
        stage.progress.say(
            f"A linear head on their features{of_task} reaches {taught.score:.1%} {metric} on the probe "
            "images, in cross-validation"
        )


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
        stage.measure(len(task) * config.aggregation.epochs, task.student)
    _keep_weights(stage, task)
    stage.run.forget_parts(stage.name)
    stage.finish(**task.nets())


def _keep_weights(stage: Stage, task: AmalgamationTask) -> None:
    if stage.config.aggregation.weights != "learnt":
        return
    weights = dict(task.shares())
    stage.run.record.learnt = weights
    steps = stage.run.record.steps
    stage.tracking.write(steps, {f"weight/{name}": weight for name, weight in weights.items()})


def _fine_tune(stage: Stage, task: AmalgamationTask, held: SeveralTasks | None) -> None:
    """A fresh head, then all of the student at a low rate, on the labels of the probe set.

    The head is fitted like a task head, to features that hold still, and so does no harm to them.
    Every step also keeps up the aggregation's loss on as many transfer images: fifty images of a
    class would else have the student forget what thousands taught it. Which weights it ends with,
    `Adaptation` says, by the labels of `held` if there are any.
    """
    config, data = stage.config, stage.data
    student = task.student
    recipe = config.finetune
    probes = Probes(data)
    steps = recipe.epochs * joint_steps(probes.sizes, config.batch)
    adaptation = Adaptation(student, recipe, task.images, held, steps, stage.ranks)

    def prepare() -> None:
        _fresh_heads(student, data, Fit(config.head.folds, config.seed))
        adaptation.ended(0)

    def draw(batches: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Drawn, ...]:
        labelled = [stage.drawn(index, generator) for index in batches]
        kept = torch.randint(len(task), (config.batch,), generator=generator)
        return *labelled, stage.drawn(kept, generator)

    def loss(*drawn: Drawn) -> tuple[Tensor, Losses]:
        *labelled, kept = drawn
        value = probes.loss(student, labelled)
        value = value + task.loss(student, kept.index, kept.jitter, task.weights)[0]
        return value, Losses(float(value.detach()))

    lesson = Lesson(
        name=stage.name,
        nets={**task.nets(), **adaptation.nets(COPY)},
        trained=[student, *task.trained(task.weights).values()],
        images=probes.sizes,
        epochs=recipe.epochs,
        cycle=OneCycle(recipe.rate, steps),
        draw=draw,
        loss=loss,
        prepare=prepare,
        measure=lambda epoch: stage.measure(epoch * sum(probes.sizes), adaptation.current()),
        stepped=adaptation.stepped,
        ended=adaptation.ended,
    )
    with stage.run.timed(stage.name):
        stage.learn(lesson, stage.generator())
    stage.run.record.adapted = adaptation.finish()
    if stage.run.record.adapted is not None:
        stage.progress.say(f"The fine-tuning {in_words(stage.run.record.adapted)}")
    _keep_weights(stage, task)
    stage.run.forget_parts(stage.name)
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
