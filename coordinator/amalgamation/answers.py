"""What the selected teachers say about the images the student trains on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.amalgamation.hints import maps_scale, signed_root
from coordinator.teachers import Teacher
from edge_teacher.contract.errors import CheckFailed


@dataclass(frozen=True)
class TeacherAnswers:
    """One teacher's features of the probe and the transfer images, in the order of the images.

    pooled_probe [P, C] and pooled_transfer [U, C] are signed roots, float32. maps_transfer
    [U, C, h, w] is of unit scale, and float16 because it is the one thing here that can be large;
    None if not asked for. maps_probe [P, C, h, w] is divided by the same number.
    """

    pooled_probe: Tensor
    pooled_transfer: Tensor
    maps_transfer: Tensor | None
    maps_probe: Tensor | None = None


def ask(
    teacher: Teacher,
    probe: NDArray[np.uint8],
    transfer: NDArray[np.uint8],
    *,
    flips: bool,
    maps: bool,
    probe_maps: bool = False,
) -> TeacherAnswers:
    """Query a teacher for images uint8[N, H, W, 3].

    With `flips` a pooled feature is the mean of the image's and its mirror image's: twice the
    queries, and features with less in them that does not matter. `probe_maps`, of which `maps` are the
    scale, come with `maps` only. Raises CheckFailed if an answer
    has the wrong shape or is not finite.
    """
    pooled_probe, pooled_transfer = (_pooled(teacher, x, flips) for x in (probe, transfer))
    if not maps:
        return TeacherAnswers(pooled_probe, pooled_transfer, None)
    of_transfer = _maps(teacher, transfer)
    scale = maps_scale(of_transfer)
    # Scaled before it is halved: no teacher's values can then leave float16's range.
    return TeacherAnswers(
        pooled_probe,
        pooled_transfer,
        (of_transfer / scale).half(),
        (_maps(teacher, probe) / scale).half() if probe_maps else None,
    )


def _pooled(teacher: Teacher, images: NDArray[np.uint8], flips: bool) -> Tensor:
    answer = _checked(teacher, teacher.pooled(images), len(images), 2, "pooled features")
    pooled = torch.from_numpy(answer)
    if flips:
        mirrored = teacher.pooled(images, mirrored=True)
        other = _checked(teacher, mirrored, len(images), 2, "pooled features")
        pooled = (pooled + torch.from_numpy(other)) / 2
    return signed_root(pooled)


def _maps(teacher: Teacher, images: NDArray[np.uint8]) -> Tensor:
    answer = _checked(teacher, teacher.features(images), len(images), 4, "feature maps")
    return torch.from_numpy(answer)


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
