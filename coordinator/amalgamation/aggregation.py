"""One round of aggregation, in the two forms that the method has.

*joint*: one student minimises sum_i w_i L_i over the images.
*fedavg*: for every selected teacher i a copy of the student minimises L_i, then
theta_S <- sum_i w_i theta_i (McMahan et al. 2017, as in the FedSA paper, where the copies live
with the clients). The w_i are those of the selection, or where weights are learnt what they are by then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coordinator.amalgamation.task import AmalgamationTask, Losses
from coordinator.checkpoints import COPY
from coordinator.loop import Drawn, Lesson
from coordinator.optimisation import OneCycle, steps_per_epoch
from coordinator.student import Student

Learn = Callable[[Lesson], None]
"""Trains what a lesson says, or restores what an earlier run trained by it."""


@dataclass(frozen=True)
class RoundPlan:
    """How a round is run. `name` is that of its stage, `number` counts from 0; the learning rate's
    cycle spans all rounds.
    """

    name: str
    number: int
    epochs: int
    batch: int
    shift: int
    cycle: OneCycle

    def first_step(self, images: int) -> int:
        return self.number * self.epochs * steps_per_epoch(images, self.batch)


def run_round(task: AmalgamationTask, plan: RoundPlan, learn: Learn) -> None:
    """Train `task.student` for one round of the form that the task's configuration names."""
    if task.config.form == "joint":
        learn(_lesson(task, plan.name, task.nets(), task.student, task.weights, plan))
        return
    copies = {}
    for name in task.weights:
        copies[name] = copy.deepcopy(task.student)
        nets = {f"{COPY}{name}": copies[name], **task.trained([name])}
        learn(_lesson(task, part_name(plan, name), nets, copies[name], {name: 1.0}, plan))
    states = {name: student.state_dict() for name, student in copies.items()}
    task.student.load_state_dict(average(states, task.shares()))


def part_name(plan: RoundPlan, teacher: str) -> str:
    """The part of a round of fedavg in which a copy learns from this teacher."""
    return f"{plan.name}, {teacher}"


def average(
    states: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """theta = sum_i w_i theta_i of every floating tensor; counters are those of the first state."""
    first = next(iter(states.values()))
    return {
        key: sum((states[n][key] * w for n, w in weights.items()), torch.zeros_like(value))
        if value.is_floating_point()
        else value.clone()
        for key, value in first.items()
    }


def _lesson(
    task: AmalgamationTask,
    name: str,
    nets: Mapping[str, nn.Module],
    student: Student,
    weights: Mapping[str, float],
    plan: RoundPlan,
) -> Lesson:
    def draw(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Drawn, ...]:
        (index,) = batch
        return (Drawn.of(index, plan.shift, generator),)

    def loss(drawn: Drawn) -> tuple[Tensor, Losses]:
        return task.loss(student, drawn.index, drawn.jitter, weights)

    return Lesson(
        name=name,
        nets=nets,
        # Each round starts its own momentum: a round is then a function of the weights it starts from.
        trained=[student, *task.trained(weights).values()],
        images=[len(task)],
        epochs=plan.epochs,
        cycle=plan.cycle,
        first_step=plan.first_step(len(task)),
        draw=draw,
        loss=loss,
    )
