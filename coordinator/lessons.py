"""What the stages of a run train: labels, a round of aggregation, the adaptation to the task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coordinator.adaptation import Adaptation
from coordinator.adapted import in_words
from coordinator.amalgamation.aggregation import RoundPlan, run_round
from coordinator.amalgamation.task import AmalgamationTask, Losses
from coordinator.checkpoints import COPY
from coordinator.config import ScratchConfig, WarmupConfig
from coordinator.data import SeveralTasks
from coordinator.kinds.kind import Features, Fit
from coordinator.labels import Probes
from coordinator.loop import Drawn, Lesson
from coordinator.optimisation import OneCycle, joint_steps, steps_per_epoch
from coordinator.stage import Stage
from coordinator.student import Student, features_of, pooled_features

_MAPS = 500


def learn_labels(
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


def aggregate(stage: Stage, number: int, task: AmalgamationTask) -> None:
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


def fine_tune(stage: Stage, task: AmalgamationTask, held: SeveralTasks | None) -> None:
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
