"""The kit's own strategy: the set of teachers whose features tell the labels best.

The paper asks where a teacher looks. What it sees there is what the student will learn, and with a few
labels that can be asked too: the evidence of the probe labels under a linear model on the teachers'
features. The set is chosen greedily by the evidence of *all* its features together, so that the second
teacher is the one that adds what the first lacks, and a copy of the first adds nothing. Measured in
docs/selection.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.selection.choice import Evidence, Selection, kept, require_at_most
from coordinator.selection.logme import logme
from coordinator.selection.marginal import kernel, log_evidence
from coordinator.selection.saliency import attention, probabilities
from edge_teacher.contract.errors import UsageError

Value = Callable[[Sequence[str]], float]
"""Names of a set of teachers, in the order they were chosen in -> how well their features tell the labels."""


@dataclass(frozen=True)
class GreedySet:
    """k teachers, each the one that adds most given those before it; equal weights.

    `measure` makes, of the evidence and the targets, what is to be greatest, in nats.
    """

    name: str
    measure: Callable[[Evidence, NDArray[np.float32]], Value]
    reads_features: bool = True
    under_saliency: bool = False

    def select(self, evidence: Evidence, k: int, rng: np.random.Generator) -> Selection:
        names = evidence.teachers
        require_at_most(k, len(names))
        targets = evidence.targets
        if targets is None:
            raise UsageError(f"selection by {self.name} needs the labels of the probe set")
        order, steps = _greedy(names, self.measure(evidence, targets), k, evidence.bonus)
        alone = steps[0]
        looks = attention(evidence, names)
        p = dict(zip(names, probabilities(np.array([alone[n] for n in names])), strict=True))
        reasons = _reasons(order, steps)
        ranked = order + sorted((n for n in names if n not in order), key=lambda n: -alone[n])
        return Selection(
            self.name,
            tuple(
                looks[name].told(
                    name,
                    score=alone[name],
                    probability=float(p[name]),
                    weight=1 / k if name in order else 0.0,
                    reason=reasons[name] + kept(evidence, name),
                )
                for name in ranked
            ),
        )


def by_evidence(evidence: Evidence, targets: NDArray[np.float32]) -> Value:
    """This kit's own: one prior for all classes, on standardised roots (`marginal`)."""
    kernels = {name: kernel(evidence.features[name]) for name in evidence.teachers}

    def value(names: Sequence[str]) -> float:
        total = np.zeros_like(kernels[names[0]])
        for name in names:
            total = total + kernels[name]
        return log_evidence(total, targets)

    return value


def by_logme(evidence: Evidence, targets: NDArray[np.float32]) -> Value:
    """LogME of the features side by side, centred and of the scales they come in."""

    def value(names: Sequence[str]) -> float:
        return logme(np.concatenate([evidence.features[n] for n in names], axis=1), targets)

    return value


def _greedy(
    names: Sequence[str], value: Value, k: int, bonus: Callable[[str], float]
) -> tuple[list[str], list[dict[str, float]]]:
    """The names in the order they were chosen, and what every step made of every candidate."""
    order: list[str] = []
    steps: list[dict[str, float]] = []
    while len(order) < k:
        steps.append({n: value([*order, n]) for n in sorted(names) if n not in order})
        order.append(max(steps[-1], key=lambda name: steps[-1][name] + bonus(name)))
    return order, steps


def _reasons(order: Sequence[str], steps: Sequence[dict[str, float]]) -> dict[str, str]:
    first = order[0]
    best_alone = max(steps[0].values()) == steps[0][first]
    words = "tells the labels best of all" if best_alone else "tells the labels"
    reasons = {first: f"{words} ({steps[0][first]:+.4f} nats)"}
    before = steps[0][first]
    for name, step in zip(order[1:], steps[1:], strict=True):
        words = "adds most" if step[name] == max(step.values()) else "adds"
        reasons[name] = f"{words} to those before it ({step[name] - before:+.4f} nats)"
        before = step[name]
    last = steps[-1]
    best = last[order[-1]]
    for name, reached in last.items():
        if name not in order:
            reasons[name] = f"in place of {order[-1]} would give {reached - best:+.4f} nats"
    return reasons
