"""One answer of a deployed student in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.decisions import decisions


@dataclass(frozen=True)
class Reading:
    """`named`: the class, or all of them separated by commas, the surest first; None where none is
    there. `probability` is that of the first one, over all pixels of a dense task the share that has it.
    `details` are what else there is to tell, by name.
    """

    named: str | None
    probability: float | None
    details: dict[str, Any] = field(default_factory=dict)


def read_answer(logits: NDArray[np.float32], classes: Sequence[str], decision: str) -> Reading:
    """logits [classes], or [classes, H, W] of a dense task, of one image."""
    found = decisions(logits[None], decision)[0]
    if found.ndim == 2:
        shares = np.bincount(found.ravel(), minlength=len(classes)) / found.size
        order = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i]]
        there = {classes[i]: round(float(shares[i]), 4) for i in order}
        return Reading(", ".join(there), next(iter(there.values())), {"shares": there})
    if decision == "each":
        odds = 1 / (1 + np.exp(-logits.astype(np.float64)))
        order = [int(i) for i in np.argsort(-odds, kind="stable")]
        every = {classes[i]: round(float(odds[i]), 4) for i in order}
        names = [classes[i] for i in order if found[i]]
        sure = every[names[0]] if names else None
        return Reading(", ".join(names) or None, sure, {"probabilities": every})
    odds = np.exp(logits - logits.max())
    best = int(found)
    return Reading(classes[best], round(float(odds[best] / odds.sum()), 4))
