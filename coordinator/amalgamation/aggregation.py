"""One round of aggregation, in the two forms that the method has.

*joint*: one student minimises sum_i w_i L_i over the images.
*fedavg*: for every selected teacher i a copy of the student minimises L_i, then
theta_S <- sum_i w_i theta_i (McMahan et al. 2017, as in the FedSA paper, where the copies live
with the clients).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator.amalgamation.task import AmalgamationTask, Losses
from coordinator.augmentation import Jitter
from coordinator.optimisation import Descent, OneCycle, shuffled_batches, steps_per_epoch
from coordinator.student import Student

OnStep = Callable[[Losses], None]


@dataclass(frozen=True)
class RoundPlan:
    """How a round is run. `number` counts from 0; the learning rate's cycle spans all rounds."""

    number: int
    epochs: int
    batch: int
    shift: int
    weight_decay: float
    cycle: OneCycle

    def first_step(self, images: int) -> int:
        return self.number * self.epochs * steps_per_epoch(images, self.batch)


def run_round(
    task: AmalgamationTask, plan: RoundPlan, generator: torch.Generator, on_step: OnStep
) -> None:
    """Train `task.student` for one round of the form that the task's configuration names."""
    if task.config.form == "joint":
        _learn(task, task.student, task.weights, plan, generator, on_step)
        return
    copies = {}
    for name in task.weights:
        copies[name] = copy.deepcopy(task.student)
        _learn(task, copies[name], {name: 1.0}, plan, generator, on_step)
    states = {name: student.state_dict() for name, student in copies.items()}
    task.student.load_state_dict(average(states, task.weights))


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


def _learn(
    task: AmalgamationTask,
    student: Student,
    weights: Mapping[str, float],
    plan: RoundPlan,
    generator: torch.Generator,
    on_step: OnStep,
) -> None:
    student.train()
    translators = task.translators(weights)
    # Each round starts its own momentum: a round is then a function of the weights it starts from.
    start = plan.first_step(len(task))
    descent = Descent([student, *translators], plan.cycle, plan.weight_decay, start)
    for _ in range(plan.epochs):
        for index in shuffled_batches(len(task), plan.batch, generator):
            jitter = Jitter.draw(len(index), plan.shift, generator)
            loss, parts = task.loss(student, index, jitter, weights)
            descent.step(loss)
            on_step(parts)
