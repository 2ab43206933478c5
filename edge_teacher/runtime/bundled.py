"""A teacher's bundle as what a runtime opens."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from edge_teacher.bundle import Bundle, TeacherCard
from edge_teacher.contract.errors import CheckFailed, RpcError
from edge_teacher.contract.images import check_images
from edge_teacher.runtime.model import Model


def teacher_model(bundle: Bundle) -> Model:
    """Raises CheckFailed if the bundle holds no teacher, or lacks a file or has a probe that cannot be read."""
    card = bundle.card
    if not isinstance(card, TeacherCard):
        raise CheckFailed("the bundle holds a student; a teacher is needed here")
    graphs = {"fp32": bundle.file(card.graph)}
    if card.half:
        graphs["fp16"] = bundle.file(card.half)
    return Model(
        name=card.graph,
        graphs=graphs,
        size=card.teacher.input_size,
        probe=images_in(bundle, card.probe) if card.probe else None,
    )


def images_in(bundle: Bundle, name: str) -> NDArray[np.uint8]:
    """uint8[N, H, W, 3] of a .npy file in a bundle. Raises CheckFailed."""
    try:
        return check_images(np.load(io.BytesIO(bundle.file(name)), allow_pickle=False))
    except (ValueError, EOFError, OSError, RpcError) as error:
        raise CheckFailed(f"the images {name} in the bundle cannot be used: {error}") from error
