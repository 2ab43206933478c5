"""What a selection is made from and what it comes to, whatever the strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed, UsageError

Maps = NDArray[np.float32]
Features = NDArray[np.float32]

Judge = Callable[[Sequence[str]], float]
"""Names of a set of teachers -> how good the set turns out to be, in truth: for studies only."""


@dataclass(frozen=True)
class Evidence:
    """What a strategy may look at, all of it about the same probe images.

    Attributes:
        student_maps: where the student looks, [P, s, s].
        teacher_maps: where each teacher looks, [P, S, S].
        targets: [P, classes]; 1 where the class is in the image (one per row for a single label).
        features: what each teacher sees, [P, D]; asked for only if the strategy reads it.
        judge: the truth, for the oracle.
        current: the teachers selected last.
        sticky: added to a current teacher's score, in the strategy's own unit: who is to replace it must
            be better by more than that.
    """

    student_maps: Maps
    teacher_maps: Mapping[str, Maps]
    targets: NDArray[np.float32] | None = None
    features: Mapping[str, Features] = field(default_factory=dict)
    judge: Judge | None = None
    current: Sequence[str] = ()
    sticky: float = 0.0

    def bonus(self, teacher: str) -> float:
        return self.sticky if teacher in self.current else 0.0

    @property
    def teachers(self) -> list[str]:
        """Sorted: the same fleet gives the same choice."""
        return sorted(self.teacher_maps)


@dataclass(frozen=True)
class TeacherScore:
    """One teacher in one selection. `weight` is its share in the aggregation, 0 if not selected."""

    teacher: str
    similarity: float
    """The mean of s_i(x) over the probe set."""
    distance: float
    score: float
    """By which the strategy ranks; of different strategies, different things."""
    probability: float
    flat_maps: int
    """Probe images on which the teacher or the student had a flat map."""
    weight: float
    reason: str

    @property
    def selected(self) -> bool:
        return self.weight > 0


@dataclass(frozen=True)
class Selection:
    """One selection: every teacher, the selected first, then the highest score first."""

    strategy: str
    teachers: tuple[TeacherScore, ...]

    @property
    def weights(self) -> dict[str, float]:
        """{name: weight} of the selected; the weights sum to 1."""
        return {t.teacher: t.weight for t in self.teachers if t.selected}


class Strategy(Protocol):
    """A way to select teachers."""

    @property
    def reads_features(self) -> bool:
        """Whether `Evidence.features` has to be there."""
        ...

    @property
    def under_saliency(self) -> bool:
        """Whether these features are pooled under the teacher's own saliency map, not over the whole."""
        ...

    def select(self, evidence: Evidence, k: int, rng: np.random.Generator) -> Selection:
        """Raises UsageError if it cannot select `k`."""
        ...


def require_sound(evidence: Evidence, strategy: Strategy) -> None:
    """Raises UsageError without a teacher, CheckFailed for what is no answer about the probe set."""
    if not evidence.teacher_maps:
        raise UsageError("There is no teacher to select from; start at least one device.")
    images = len(evidence.student_maps)
    _require_saliency("The student", evidence.student_maps, images)
    for name, maps in evidence.teacher_maps.items():
        _require_saliency(name, maps, images)
    if not strategy.reads_features:
        return
    for name in evidence.teacher_maps:
        found = evidence.features.get(name)
        if found is None or found.ndim != 2 or len(found) != images or 0 in found.shape:
            shape = "none" if found is None else f"shape {list(found.shape)}"
            raise CheckFailed(f"{name} gave features of {shape} for {images} probe images")
        if not np.isfinite(found).all():
            raise CheckFailed(f"{name} gave features that are not finite; leave it out")


def _require_saliency(who: str, maps: Maps, images: int) -> None:
    if maps.ndim != 3 or len(maps) != images or 0 in maps.shape:
        raise CheckFailed(
            f"{who} gave saliency maps of shape {list(maps.shape)} for {images} probe images; "
            "it must be [N, S, S], one map for each image."
        )
    if not np.isfinite(maps).all() or maps.min() < 0:
        raise CheckFailed(
            f"{who} gave a saliency map with negative or non-finite values; "
            "export it again, or leave it out."
        )


def kept(evidence: Evidence, teacher: str) -> str:
    """What to add to a reason where `sticky` had a say."""
    if not evidence.bonus(teacher):
        return ""
    return f"; selected before, which counts {evidence.sticky:g}"


def require_at_most(k: int, teachers: int) -> None:
    if k > teachers:
        raise UsageError(
            f"selection.k is {k}, and only {teachers} teacher{'s' * (teachers != 1)} answered; "
            "lower selection.k or start more devices."
        )
