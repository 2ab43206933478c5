"""A training run: warm up, select, aggregate, fine-tune; and the baseline it is judged by.

The order is the method's (Xie et al. 2022): the student is warmed up on the probe set, then for
some rounds learns from the teachers, selected again every so often as it changes, and at last gets
a fresh head that is trained on the probe set. Every stage that learns is a `Lesson` for the one
loop, which keeps the state on disk; a run that was interrupted, in whatever way, goes on from there
and ends with the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.adaptation import hold_out
from coordinator.adapted import Adapted
from coordinator.amalgamation.task import AmalgamationTask
from coordinator.augmentation import with_views
from coordinator.checkpoints import CurvePoint, RoundSelection, Run
from coordinator.config import Config
from coordinator.consultation import Consultation
from coordinator.data import SeveralTasks, TaskData, as_several
from coordinator.lessons import aggregate, fine_tune, learn_labels
from coordinator.measures import first_metric, measured
from coordinator.optimisation import stage_generator
from coordinator.progress import Progress, Silent
from coordinator.ranks import ALONE, Ranks
from coordinator.requirements import require_enough, require_judgeable, require_shares
from coordinator.roster import Lost, Online, Roster
from coordinator.selection import Selection
from coordinator.stage import Stage
from coordinator.student import (
    HeadSpec,
    Student,
    StudentSpec,
    save_student,
)
from coordinator.targets import amalgamation_task, refit, refit_name, refits_before
from coordinator.teachers import Teacher
from coordinator.tracking import UNTRACKED, Tracking
from edge_teacher.contract.errors import UsageError


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
        learn_labels(stage("scratch", tasks), "scratch", scratch, config.scratch)

    # The same first weights as the baseline's: what differs in the end is what the teachers gave.
    student = _new_student(spec, config.seed).to(device)
    learn_labels(stage("warm-up"), "student", student, config.warmup)

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
            task = amalgamation_task(round_stage, student, consultation, number)
        if number in refits_before(config.aggregation):
            refit(stage(refit_name(number)), task)
        aggregate(round_stage, number, task)

    if config.finetune.epochs:
        finetune = stage("fine-tune")
        if not finetune.resumed(student=student):
            if task is None:
                task = amalgamation_task(finetune, student, consultation, config.aggregation.rounds)
            fine_tune(finetune, task, held)

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


def _new_student(spec: StudentSpec, seed: int) -> Student:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Student(spec)
