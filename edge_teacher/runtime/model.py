"""What is to be executed: the graphs of one teacher or student, and the images a runtime is proved on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime.session import Session

CPU_DIALECTS = ("int8_cpu", "fp32")
"""Graphs ONNX Runtime's CPU provider executes, fastest first."""
GPU_DIALECTS = ("int8_tensorrt", "fp16", "fp32")
"""Graphs a GPU executes, likely the fastest first; which one is, is measured."""
PROBE_IMAGES = 16


def accept_all(_session: Session, _dialect: str) -> None:
    """Nothing more is asked of a runtime than agreement with the CPU."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One teacher or student, in all the dialects it comes in."""

    name: str
    """For messages."""
    graphs: Mapping[str, bytes]
    """Dialect (`fp32`, `fp16`, `int8_cpu`, `int8_tensorrt`) to ONNX file."""
    size: tuple[int, int]
    """(height, width) it works at."""
    probe: NDArray[np.uint8] | None = None
    """uint8[N, H, W, 3], what the bundle brings for the proof; None: generated images."""
    accept: Callable[[Session, str], None] = accept_all
    """Raises CheckFailed for a session (of that dialect) that must not answer: a student has its canary."""

    def first(self, dialects: tuple[str, ...]) -> str:
        """The first of `dialects` it comes in. Raises CheckFailed if there is none."""
        for dialect in dialects:
            if dialect in self.graphs:
                return dialect
        raise CheckFailed(
            f"{self.name} comes as {', '.join(self.graphs)}; this device's runtime executes "
            f"{', '.join(dialects)}"
        )

    def images(self) -> NDArray[np.uint8]:
        """What runtimes are compared on: at most 16 images."""
        found = generated(self.size) if self.probe is None else self.probe
        return np.ascontiguousarray(found[:PROBE_IMAGES])


def generated(size: tuple[int, int], count: int = PROBE_IMAGES) -> NDArray[np.uint8]:
    """The same images on every machine: smooth ones with some noise, uint8[count, H, W, 3]."""
    random = np.random.default_rng(0)
    coarse = random.random((count, 6, 6, 3), np.float32)
    rows, columns = (np.linspace(0, 5, side, dtype=np.float32) for side in size)
    smooth = _between(_between(coarse, rows, 1), columns, 2)
    noisy = smooth + 0.05 * random.standard_normal(smooth.shape, np.float32)
    images: NDArray[np.uint8] = (noisy.clip(0, 1) * 255).round().astype(np.uint8)
    return images


def _between(
    values: NDArray[np.float32], at: NDArray[np.float32], axis: int
) -> NDArray[np.float32]:
    """Linear interpolation along an axis."""
    low = np.minimum(at.astype(np.intp), values.shape[axis] - 2)
    share = (at - low).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    below, above = (np.take(values, index, axis) for index in (low, low + 1))
    mixed: NDArray[np.float32] = below * (1 - share) + above * share
    return mixed
