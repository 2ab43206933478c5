"""How the answers of a student are compared and measured; what kinds of task there are is not known here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.decisions import Decision


@dataclass(frozen=True)
class Scoring:
    """One kind of student.

    Attributes:
        kind: its name, for the card.
        decision: how an answer is read off the logits.
        dimensions: of the logits, batch and classes included: 2, or 4 with an answer for every pixel.
        metric: what `measure` gives is called so.
        kept: as much of a batch's logits float32[n, classes, …] as `measure` needs; batches are joined.
        measure: (kept of all images, labels) -> a fraction, 1 is best.
    """

    kind: str
    decision: Decision
    dimensions: int
    metric: str
    kept: Callable[[NDArray[np.float32]], NDArray[Any]]
    measure: Callable[[NDArray[Any], NDArray[Any]], float]


TOP_1 = Scoring(
    kind="single-label",
    decision="top-1",
    dimensions=2,
    metric="accuracy",
    kept=lambda logits: np.asarray(logits.argmax(1)),
    measure=lambda kept, labels: float((kept == labels).mean()),
)
"""A classifier, measured by the fraction of images whose largest logit is at the label int64[N]."""
