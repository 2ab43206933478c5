"""What the selected teachers say about the images the student trains on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.amalgamation.hints import signed_root, unit_scale_maps
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
    return TeacherAnswers(
        _pooled(teacher, probe, flips),
        _pooled(teacher, transfer, flips),
        _maps(teacher, transfer) if maps else None,
    )


def _pooled(teacher: Teacher, images: NDArray[np.uint8], flips: bool) -> Tensor:
    answer = _checked(teacher, teacher.pooled(images), len(images), 2, "pooled features")
    pooled = torch.from_numpy(answer)
    if flips:
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        other = _checked(teacher, teacher.pooled(mirrored), len(images), 2, "pooled features")
        pooled = (pooled + torch.from_numpy(other)) / 2
    return signed_root(pooled)


def _maps(teacher: Teacher, images: NDArray[np.uint8]) -> Tensor:
    answer = _checked(teacher, teacher.features(images), len(images), 4, "feature maps")
    # Scaled before it is halved: no teacher's values can then leave float16's range.
    return unit_scale_maps(torch.from_numpy(answer)).half()


def _checked(
    teacher: Teacher, answer: NDArray[np.float32], images: int, dimensions: int, what: str
) -> NDArray[np.float32]:
    if answer.ndim != dimensions or len(answer) != images or 0 in answer.shape:
        raise CheckFailed(
            f"{teacher.name} answered {images} images with {what} of shape {list(answer.shape)}; "
            f"it must have {dimensions} dimensions, the first of {images}."
        )
    if not np.isfinite(answer).all():
        raise CheckFailed(
            f"{teacher.name} answered with {what} that are not finite; "
            "export the teacher again, or leave it out."
        )
    return answer.astype(np.float32)
