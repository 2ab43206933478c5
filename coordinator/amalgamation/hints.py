"""Hint losses (FitNets, Romero et al. 2015): the student's features should tell the teacher's.

Teachers' features differ in scale by orders of magnitude, and would so weigh in the loss whatever
the selection said. So they are brought to unit scale over the transfer set first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPSILON = 1e-6


def map_hint(
    translator: nn.Module, student: Tensor, teacher: Tensor, each: Tensor | None = None
) -> Tensor:
    """mean ||R(F_S) - F_T||^2 over images, channels and pixels; a scalar.

    student [N, c, h, w] is brought to the spatial size of teacher [N, C, H, W] before it is
    translated, so that what the teacher said is compared as it was said. `each` [N]: what every image
    counts; 1 if not given.
    """
    if student.shape[2:] != teacher.shape[2:]:
        student = F.interpolate(
            student, list(teacher.shape[2:]), mode="bilinear", align_corners=False
        )
    return _distance(translator(student), teacher, each)


def pooled_hint(
    translator: nn.Module, student: Tensor, teacher: Tensor, each: Tensor | None = None
) -> Tensor:
    """mean ||R(f_S) - f_T||^2 over images and channels; student [N, c], teacher [N, C].

    `each` as for `map_hint`.
    """
    return _distance(translator(student), teacher, each)


def _distance(student: Tensor, teacher: Tensor, each: Tensor | None) -> Tensor:
    if each is None:
        return F.mse_loss(student, teacher)
    by_image = F.mse_loss(student, teacher, reduction="none").flatten(1).mean(1)
    return (each.to(by_image.device) * by_image).mean()


def maps_scale(maps: Tensor) -> Tensor:
    """The root mean square of maps [N, C, h, w] over all of them: divided by it, they are of unit scale.

    Not centred: zero means "nothing here" after a ReLU, and stays zero.
    """
    # The norm makes no second copy of what can be hundreds of megabytes.
    norm: Tensor = torch.linalg.vector_norm(maps)
    return norm.div(maps.numel() ** 0.5).clamp_min(_EPSILON)


def signed_root(pooled: Tensor) -> Tensor:
    """sign(x) sqrt(|x|), elementwise.

    A pooled ReLU channel is near zero for most images and large for a few. Its root is closer to
    what squares and logistic regression take for granted; heads on it were about one point better.
    """
    return pooled.sign() * pooled.abs().sqrt()


def standardise(pooled: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of each channel of pooled features [N, C], the deviation never zero."""
    return pooled.mean(0), pooled.std(0, correction=0).clamp_min(_EPSILON)
