"""What an answer must be, whoever gave it. A teacher that answers otherwise is not learnt from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed


def flat_maps(maps: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Of maps [N, S, S]: which have one value everywhere, and so point nowhere. bool[N]."""
    found: NDArray[np.bool_] = maps.max((1, 2)) == maps.min((1, 2))
    return found


def check_saliency(teacher: str, maps: NDArray[np.float32], images: int) -> NDArray[np.float32]:
    """Maps [N, S, S] of so many images, >= 0, and not flat on every one of them.

    Raises CheckFailed.
    """
    check_answer(teacher, maps, images, 3, "saliency maps")
    if maps.min() < 0:
        raise CheckFailed(f"{teacher} answered with saliency maps that have negative values")
    if flat_maps(maps).all():
        raise CheckFailed(
            f"{teacher} answered with a flat saliency map for each of {images} images: it looks nowhere"
        )
    return maps


def check_answer(
    teacher: str, answer: NDArray[np.float32], images: int, dimensions: int, what: str
) -> NDArray[np.float32]:
    """float32 of so many dimensions, the first of them `images`, and finite. Raises CheckFailed."""
    if answer.ndim != dimensions or len(answer) != images or 0 in answer.shape:
        raise CheckFailed(
            f"{teacher} answered {images} images with {what} of shape {list(answer.shape)}; "
            f"it must have {dimensions} dimensions, the first of {images}."
        )
    if not np.isfinite(answer).all():
        raise CheckFailed(
            f"{teacher} answered with {what} that are not finite; "
            "export the teacher again, or leave it out."
        )
    return answer.astype(np.float32, copy=False)
