"""Which teachers take part: those that look where the student looks.

Method and symbols: Xie et al. 2022 (arXiv 2207.13309), sections on saliency-based selection.
On every probe image x the student and each teacher i give a saliency map M(x):

    s_i(x) = 1/2 + 1/2 cos(M_S(x), M_i(x))       similarity on one image
    d_i    = |P| / sum_x s_i(x)                  transfer distance; 1 is best
    q_i    = 2 - d_i                             score
    p      = softmax(rescaled q)                 rescaled to [0, 1] by the least and greatest q

A flat map (all zeros) points nowhere. Its cosine is taken as 0, so s_i(x) = 1/2: as for two maps
that nowhere overlap, it is no evidence that they look at the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from edge_teacher.contract.errors import CheckFailed, UsageError

Maps = NDArray[np.float32]

# Scores closer than this are equal: rescaling would blow rounding errors up to the whole of [0, 1].
_TIE = 1e-9


@dataclass(frozen=True)
class Evidence:
    """What a strategy may look at: the student's maps [N, s, s] and each teacher's [N, S, S]."""

    student_maps: Maps
    teacher_maps: Mapping[str, Maps]


@dataclass(frozen=True)
class TeacherScore:
    """One teacher in one selection. `weight` is its share in the aggregation, 0 if not selected."""

    teacher: str
    similarity: float
    """The mean of s_i(x) over the probe set."""
    distance: float
    score: float
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
    """One selection: every teacher, the highest score first."""

    strategy: str
    teachers: tuple[TeacherScore, ...]

    @property
    def weights(self) -> dict[str, float]:
        """{name: weight} of the selected; the weights sum to 1."""
        return {t.teacher: t.weight for t in self.teachers if t.selected}


class Strategy(Protocol):
    """A way to select teachers."""

    def select(self, evidence: Evidence, k: int, rng: np.random.Generator) -> Selection:
        """Raises UsageError if it cannot select `k` of the teachers there are."""
        ...


def select(strategy: str, evidence: Evidence, k: int, rng: np.random.Generator) -> Selection:
    """Select by the strategy of that name.

    Raises UsageError for an unknown strategy, no teacher, or k greater than there are teachers;
    CheckFailed for what is no saliency map of this probe set.
    """
    if strategy not in STRATEGIES:
        raise UsageError(
            f"There is no selection strategy {strategy!r}; it is one of {', '.join(STRATEGIES)}."
        )
    if not evidence.teacher_maps:
        raise UsageError("There is no teacher to select from; start at least one device.")
    _require_saliency("The student", evidence.student_maps, len(evidence.student_maps))
    for name, maps in evidence.teacher_maps.items():
        _require_saliency(name, maps, len(evidence.student_maps))
    return STRATEGIES[strategy].select(evidence, k, rng)


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


def common_size(evidence: Evidence) -> tuple[int, int]:
    """The size that all maps are compared at: the largest there is, so that none loses detail."""
    shapes = [evidence.student_maps.shape, *(m.shape for m in evidence.teacher_maps.values())]
    return max(s[1] for s in shapes), max(s[2] for s in shapes)


def similarities(student: Maps, teacher: Maps, size: tuple[int, int]) -> NDArray[np.float64]:
    """s_i(x) of every probe image, [N] in [1/2, 1], with both maps brought to `size`."""
    a = resize_maps(student, size).reshape(len(student), -1)
    b = resize_maps(teacher, size).reshape(len(teacher), -1)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("np,np->n", a, b)
    cosine = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    s: NDArray[np.float64] = 0.5 + 0.5 * np.clip(cosine, 0.0, 1.0)
    return s


def resize_maps(maps: Maps, size: tuple[int, int]) -> NDArray[np.float64]:
    """maps [N, s, t] -> [N, *size] bilinearly, pixel centres aligned (ONNX `half_pixel`)."""
    tensor = torch.from_numpy(maps).double()[:, None]
    if maps.shape[1:] != size:
        tensor = F.interpolate(tensor, size, mode="bilinear", align_corners=False)
    resized: NDArray[np.float64] = tensor[:, 0].numpy()
    return resized


def transfer_distance(similarity: NDArray[np.float64]) -> float:
    """d_i = |P| / sum s_i(x): 1 where all maps agree, 2 where none overlap."""
    return len(similarity) / float(similarity.sum())


def probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """p = softmax of the scores rescaled to [0, 1]; uniform where all are equal."""
    least, greatest = scores.min(), scores.max()
    spread = greatest - least
    rescaled = (scores - least) / spread if spread > _TIE else np.zeros_like(scores)
    weights = np.exp(rescaled - rescaled.max())
    p: NDArray[np.float64] = weights / weights.sum()
    return p


# A choice of teachers, by what is known of each: (probabilities, the highest first) -> (weights,
# and for each teacher the reason).
_Choose = Callable[
    [NDArray[np.float64], int, np.random.Generator], tuple[NDArray[np.float64], list[str]]
]


@dataclass(frozen=True)
class SaliencyStrategy:
    """Score every teacher by the cosine of its saliency maps, then choose by the probabilities."""

    name: str
    choose: _Choose

    def select(self, evidence: Evidence, k: int, rng: np.random.Generator) -> Selection:
        student = evidence.student_maps
        names = sorted(evidence.teacher_maps)
        size = common_size(evidence)
        similarity = {n: similarities(student, evidence.teacher_maps[n], size) for n in names}
        distance = {n: transfer_distance(similarity[n]) for n in names}
        # Equal scores stay in the order of their names: the same fleet gives the same choice.
        names.sort(key=lambda n: distance[n])
        scores = np.array([2 - distance[n] for n in names])
        p = probabilities(scores)
        weights, reasons = self.choose(p, k, rng)
        student_flat = ~student.any(axis=(1, 2))
        return Selection(
            self.name,
            tuple(
                TeacherScore(
                    teacher=n,
                    similarity=float(similarity[n].mean()),
                    distance=distance[n],
                    score=float(scores[i]),
                    probability=float(p[i]),
                    flat_maps=int((student_flat | ~evidence.teacher_maps[n].any((1, 2))).sum()),
                    weight=float(weights[i]),
                    reason=reasons[i],
                )
                for i, n in enumerate(names)
            ),
        )


def _top_k(
    p: NDArray[np.float64], k: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], list[str]]:
    """The k most probable; weights are the softmax over the chosen, which is p over their sum."""
    _require_at_most(k, len(p))
    weights = np.where(np.arange(len(p)) < k, p, 0.0)
    ranks = range(1, len(p) + 1)
    reasons = [
        f"rank {r} of {len(p)}, among the {k} best"
        if r <= k
        else f"rank {r} of {len(p)}, below the {k} best"
        for r in ranks
    ]
    return weights / weights.sum(), reasons


def _sampled(
    p: NDArray[np.float64], k: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], list[str]]:
    """k draws from p with replacement, each of weight 1/k."""
    drawn = np.bincount(rng.choice(len(p), size=k, p=p), minlength=len(p))
    reasons = [
        f"drawn {n} of {k} times with probability {q:.3f}" for n, q in zip(drawn, p, strict=True)
    ]
    return drawn / k, reasons


def _random(
    p: NDArray[np.float64], k: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], list[str]]:
    """k teachers by lot, whatever their scores: what a selection must beat."""
    _require_at_most(k, len(p))
    weights = np.zeros(len(p))
    weights[rng.choice(len(p), size=k, replace=False)] = 1 / k
    return weights, ["drawn by lot" if w else "not drawn" for w in weights]


def _all(
    p: NDArray[np.float64], k: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], list[str]]:
    """Every teacher, weighted by p; k is not used."""
    return p, ["all teachers take part"] * len(p)


def _require_at_most(k: int, teachers: int) -> None:
    if k > teachers:
        raise UsageError(
            f"selection.k is {k}, and only {teachers} teacher{'s' * (teachers != 1)} answered; "
            "lower selection.k or start more devices."
        )


STRATEGIES: Mapping[str, Strategy] = {
    "top-k": SaliencyStrategy("top-k", _top_k),
    "sampled": SaliencyStrategy("sampled", _sampled),
    "random": SaliencyStrategy("random", _random),
    "all": SaliencyStrategy("all", _all),
}
