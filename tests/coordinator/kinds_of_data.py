"""Small coloured images of every kind of task: what is to be told shows in the tint of a part."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coordinator.data import LabelledImages, TaskData
from tests.coordinator.local_teacher import coloured_images

_TINTS = np.array([[70, 0, 0], [0, 70, 0], [0, 0, 70]])
COLOURS = ("red", "green", "blue")
GROUNDS = ("ground", "red", "blue")


def noise(count: int, seed: int, size: int) -> tuple[NDArray[np.int64], np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.integers(60, 150, (count, size, size, 3)), rng


def single(count: int, seed: int, size: int = 16) -> LabelledImages:
    images, labels = coloured_images(count, 3, seed, size)
    return LabelledImages(images, labels, COLOURS)


def multi(count: int, seed: int, size: int = 16) -> LabelledImages:
    """Each colour is there or not, in a third of the rows of its own."""
    images, rng = noise(count, seed, size)
    labels = (rng.random((count, 3)) < 0.4).astype(np.uint8)
    labels[:3] = np.eye(3, dtype=np.uint8)
    for c, rows in enumerate(np.array_split(np.arange(size), 3)):
        images[:, rows] += (labels[:, c, None] * _TINTS[c])[:, None, None, :]
    return LabelledImages(images.astype(np.uint8), labels, COLOURS, "multi-label")


def dense(count: int, seed: int, size: int = 16) -> LabelledImages:
    """A red or a blue band of a third of the height or the width on grey ground, its rim unknown."""
    images, rng = noise(count, seed, size)
    labels = np.zeros((count, size, size), np.int64)
    for i in range(count):
        start, long = int(rng.integers(0, 2)) * size // 2, size // 2
        colour = 1 + i % 2
        place = (slice(start, start + long), slice(None))
        if rng.random() < 0.5:
            place = place[::-1]
        images[i][place] += _TINTS[0 if colour == 1 else 2]
        labels[i][place] = colour
    labels[:, 0, :] = 255
    return LabelledImages(images.astype(np.uint8), labels, GROUNDS, "dense")


MAKE = {"single-label": single, "multi-label": multi, "dense": dense}


def task_data(kind: str, size: int = 16, probe: int = 48, transfer: int = 96) -> TaskData:
    make = MAKE[kind]
    return TaskData(make(probe, 0, size), make(transfer, 1, size).images, make(60, 2, size))
