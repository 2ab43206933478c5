"""What the selected teachers say about the images the student trains on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.amalgamation.hints import signed_root, unit_scale_maps
from coordinator.answers.checks import check_answer
from coordinator.teachers import Teacher
from edge_teacher.contract.errors import CheckFailed


@dataclass(frozen=True)
class TeacherAnswers:
    """One teacher's features of the probe and the transfer images, in the order of the images.

    pooled_probe [P, C] and pooled_transfer [U, C] are signed roots, float32. maps_transfer
    [U, C, h, w] is of unit scale, and float16 because it is the one thing here that can be large;
    None if not asked for.
    """

    pooled_probe: Tensor
    pooled_transfer: Tensor
    maps_transfer: Tensor | None


def ask(
    teacher: Teacher,
    probe: NDArray[np.uint8],
    transfer: NDArray[np.uint8],
    *,
    flips: bool,
    maps: bool,
) -> TeacherAnswers:
    """Query a teacher for images uint8[N, H, W, 3].

    With `flips` a pooled feature is the mean of the image's and its mirror image's: twice the
    queries, and features with less in them that does not matter. Raises CheckFailed if an answer
    has the wrong shape or is not finite.
    """
    pooled = _pooled(teacher, probe, flips), _pooled(teacher, transfer, flips)
    _require_same_width(teacher, *pooled)
    return TeacherAnswers(*pooled, _maps(teacher, transfer) if maps else None)


def _pooled(teacher: Teacher, images: NDArray[np.uint8], flips: bool) -> Tensor:
    return signed_root(torch.from_numpy(ask_pooled(teacher, images, flips=flips)))


def ask_pooled(teacher: Teacher, images: NDArray[np.uint8], *, flips: bool) -> NDArray[np.float32]:
    """The pooled features of images uint8[N, H, W, 3], float32[N, C], as `ask` has them asked for."""
    what = "pooled features"
    pooled = check_answer(teacher.name, teacher.pooled(images), len(images), 2, what)
    if flips:
        mirrored = teacher.pooled(images, mirrored=True)
        other = check_answer(teacher.name, mirrored, len(images), 2, what)
        _require_same_width(teacher, pooled, other)
        pooled = ((pooled + other) / 2).astype(np.float32)
    return pooled


def _maps(teacher: Teacher, images: NDArray[np.uint8]) -> Tensor:
    answer = check_answer(teacher.name, teacher.features(images), len(images), 4, "feature maps")
    # Scaled before it is halved: no teacher's values can then leave float16's range.
    return unit_scale_maps(torch.from_numpy(answer)).half()


def _require_same_width(
    teacher: Teacher, one: NDArray[np.float32] | Tensor, other: NDArray[np.float32] | Tensor
) -> None:
    if one.shape[1] != other.shape[1]:
        raise CheckFailed(
            f"{teacher.name} answered with {one.shape[1]} pooled features for some images and "
            f"{other.shape[1]} for others."
        )
