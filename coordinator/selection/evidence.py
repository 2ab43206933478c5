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

from coordinator.selection.choice import Evidence, Selection, kept, require_at_most
from coordinator.selection.marginal import Floats, kernel, log_evidence
from coordinator.selection.saliency import attention, probabilities
from edge_teacher.contract.errors import UsageError


@dataclass(frozen=True)
class GreedyEvidence:
    """k teachers, each the one that raises the evidence most given those before it; equal weights."""

    name: str = "evidence"
    reads_features: bool = True

    def select(self, evidence: Evidence, k: int, rng: np.random.Generator) -> Selection:
        names = evidence.teachers
        require_at_most(k, len(names))
        targets = evidence.targets
        if targets is None:
            raise UsageError("selection by evidence needs the labels of the probe set")
        kernels = {name: kernel(evidence.features[name]) for name in names}
        order, steps = _greedy(
            kernels, lambda total: log_evidence(total, targets), k, evidence.bonus
        )
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


def _greedy(
    kernels: dict[str, Floats],
    score: Callable[[Floats], float],
    k: int,
    bonus: Callable[[str], float],
) -> tuple[list[str], list[dict[str, float]]]:
    """The names in the order they were chosen, and what every step made of every candidate."""
    order: list[str] = []
    steps: list[dict[str, float]] = []
    total = np.zeros_like(next(iter(kernels.values())))
    while len(order) < k:
        steps.append({n: score(total + kernels[n]) for n in sorted(kernels) if n not in order})
        order.append(max(steps[-1], key=lambda name: steps[-1][name] + bonus(name)))
        total = total + kernels[order[-1]]
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
