"""The paper's scores: a teacher is worth asking if it looks where the student looks.

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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from coordinator.selection.choice import Evidence, Maps, TeacherScore

# Scores closer than this are equal: rescaling would blow rounding errors up to the whole of [0, 1].
_TIE = 1e-9


@dataclass(frozen=True)
class Attention:
    """How a teacher's attention compares with the student's."""

    similarity: float
    distance: float
    flat_maps: int

    @property
    def score(self) -> float:
        return 2 - self.distance

    def told(
        self, teacher: str, *, score: float, probability: float, weight: float, reason: str
    ) -> TeacherScore:
        """What a strategy made of the teacher, beside where it looks."""
        return TeacherScore(
            teacher=teacher,
            similarity=self.similarity,
            distance=self.distance,
            score=score,
            probability=probability,
            flat_maps=self.flat_maps,
            weight=weight,
            reason=reason,
        )


def attention(evidence: Evidence, teachers: Sequence[str]) -> dict[str, Attention]:
    """Of each of the teachers."""
    student = evidence.student_maps
    size = common_size(evidence)
    student_flat = ~student.any(axis=(1, 2))
    found = {}
    for name in teachers:
        maps = evidence.teacher_maps[name]
        s = similarities(student, maps, size)
        flat = int((student_flat | ~maps.any((1, 2))).sum())
        found[name] = Attention(float(s.mean()), transfer_distance(s), flat)
    return found


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
