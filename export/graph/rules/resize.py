"""Resize and Pad: linear along each spatial axis, so their gradient is a product with constant matrices.

A row of the matrix of Resize holds the weights of the input pixels that one output pixel is made of (ONNX
operator Resize-18); that of Pad says which input pixel an output pixel is a copy of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.graph.emit import Ops, Value
from export.graph.registry import Step, rule
from export.graph.rules.matrices import Matrix, apply_along, block_size, one_hot_rows
from export.graph.shapes import ONE, Dim

FLOAT = 1  # onnx.TensorProto.FLOAT, the type of scales


@rule("Resize", "Upsample")
def resize(step: Step) -> None:
    """y = A_h x A_w^T; dx = A_h^T dy A_w."""
    x, y, dx = step.x(), step.y(), step.dy
    unruled = {"antialias": 0, "exclude_outside": 0, "keep_aspect_ratio_policy": "stretch"}
    for name, harmless in unruled.items():
        if step.attribute(name, harmless) != harmless:
            step.refuse(f"its attribute {name} has no rule")
    sampling = Sampling(
        step.attribute("mode", "nearest"),
        step.attribute("coordinate_transformation_mode", "half_pixel"),
        step.attribute("nearest_mode", "round_prefer_floor"),
        step.attribute("cubic_coeff_a", -0.75),
    )
    for axis, scale in enumerate(_scales(step)):
        if x.shape[axis] == y.shape[axis] and scale == 1:
            continue
        if x.shape[axis].batched:
            step.refuse("it resizes the batch")
        try:
            matrix = sampling.matrix(x.shape[axis].size, y.shape[axis].size, scale)
        except ValueError as error:
            step.refuse(str(error))
        dx = spread(step.ops, dx, axis, matrix)
    step.give(0, dx)


def _scales(step: Step) -> list[float]:
    """The scale of every axis: as given, or from the sizes."""
    x, y = step.x(), step.y()
    implied = [b.size / a.size for a, b in zip(x.shape, y.shape, strict=True)]
    given = step.constant(2 if step.node.op_type == "Resize" else 1)
    if given is None or given.size == 0:
        return implied
    axes = [axis % x.rank for axis in step.attribute("axes", list(range(x.rank)))]
    return [float(given[axes.index(a)]) if a in axes else 1.0 for a in range(x.rank)]


def spread(ops: Ops, dy: Value, axis: int, matrix: Matrix) -> Value:
    """dx = matrix^T dy along one axis; blocks that tile the axis are summed, or repeated, without a matrix."""
    if dy.shape[axis] != ONE:
        before, after = dy.shape[:axis], dy.shape[axis + 1 :]
        if block := block_size(matrix):
            parts = ops.reshape(dy, (*before, Dim(matrix.shape[1]), Dim(block), *after))
            total = ops.reduce("ReduceSum", parts, [axis + 1], keep=False)
            return ops.mul(total, float(matrix.max()))
        if block := block_size(matrix.T):
            dy = ops.mul(dy, float(matrix.max()))
            return _repeat(ops, dy, axis, block)
    return apply_along(ops, dy, axis, matrix.T)


def _repeat(ops: Ops, x: Value, axis: int, times: int) -> Value:
    """Every number along an axis several times in a row: for maps as Resize, many times faster than Expand."""
    before, size, after = x.shape[:axis], x.shape[axis].size, x.shape[axis + 1 :]
    shape = (*before, Dim(size * times), *after)
    if x.rank == 4:
        scales = ops.constant([times if a == axis else 1 for a in range(4)], FLOAT)
        return ops.emit(
            "Resize",
            [x, None, scales],
            shape,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    parts = ops.reshape(x, (*before, Dim(size), ONE, *after))
    like = Value("", (*before, Dim(size), Dim(times), *after), x.dtype)
    return ops.reshape(ops.expand(parts, like, [axis + 1]), shape)


@dataclass(frozen=True)
class Sampling:
    """How Resize-18 chooses its source pixels; the field names are the operator's attributes."""

    mode: str = "nearest"
    coordinate_transformation_mode: str = "half_pixel"
    nearest_mode: str = "round_prefer_floor"
    cubic_coeff_a: float = -0.75

    def matrix(self, size: int, out: int, scale: float) -> Matrix:
        """[out, size] weights of one axis. Raises ValueError for a coordinate mode that is not linear in x."""
        if self.mode == "nearest":
            # ONNX Runtime computes in float32: on the border of two pixels it matters how that rounds.
            near = self._source(size, out, np.float32(scale), np.float32)
            rounded = {
                "round_prefer_floor": np.ceil(near - np.float32(0.5)),
                "round_prefer_ceil": np.floor(near + np.float32(0.5)),
                "floor": np.floor(near),
                "ceil": np.ceil(near),
            }[self.nearest_mode]
            return one_hot_rows([int(i) for i in np.clip(rounded, 0, size - 1)], size)
        source = self._source(size, out, scale, np.float64)
        if self.mode == "linear":
            inside = np.clip(source, 0, size - 1)
            return _interpolation(inside, size, (0, 1), lambda t: np.maximum(0, 1 - np.abs(t)))
        return _interpolation(source, size, (-1, 0, 1, 2), self._keys)

    def _source(
        self, size: int, out: int, scale: float | np.float32, precision: type[np.floating]
    ) -> NDArray[Any]:
        """The input coordinate of every output pixel."""
        position = np.arange(out, dtype=precision)
        match self.coordinate_transformation_mode:
            case "align_corners":
                return position * (size - 1) / max(out - 1, 1)
            case "asymmetric":
                return position / scale
            case "pytorch_half_pixel" if out == 1:
                return position * 0
            case "half_pixel" | "pytorch_half_pixel":
                return (position + 0.5) / scale - 0.5
            case "half_pixel_symmetric":
                middle = precision(size / 2) * (1 - precision(out) / (scale * size))
                return middle + (position + 0.5) / scale - 0.5
            case "tf_half_pixel_for_nn":
                return (position + 0.5) / scale
            case other:
                raise ValueError(f"coordinate_transformation_mode {other!r} has no rule")

    def _keys(self, t: Matrix) -> Matrix:
        """The cubic convolution kernel (Keys, 1981)."""
        a, t = self.cubic_coeff_a, np.abs(t)
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        weights: Matrix = np.where(t <= 1, near, np.where(t < 2, far, 0))
        return weights


def _interpolation(
    source: Matrix, size: int, taps: tuple[int, ...], kernel: Callable[[Matrix], Matrix]
) -> Matrix:
    """Weights kernel(source - pixel) of the pixels around each coordinate, clamped at the border."""
    matrix = np.zeros((len(source), size))
    floor = np.floor(source).astype(int)
    for tap in taps:
        pixel = floor + tap
        np.add.at(
            matrix, (np.arange(len(source)), np.clip(pixel, 0, size - 1)), kernel(source - pixel)
        )
    return matrix


@rule("Pad")
def pad(step: Step) -> None:
    """A padded pixel is a constant (its gradient is dropped) or a copy (its gradient joins the original's)."""
    x, y, dx = step.x(), step.y(), step.dy
    pads = step.integers(1)
    if pads is None:
        step.refuse("it has no pads")
    axes = step.integers(3) or list(range(x.rank))
    mode = step.attribute("mode", "constant")
    for position, signed in enumerate(axes):
        axis, before, after = signed % x.rank, pads[position], pads[position + len(axes)]
        if before == after == 0:
            continue
        if x.shape[axis].batched:
            step.refuse("it pads the batch")
        size = x.shape[axis].size
        if mode == "constant":
            if dx.shape[axis] == ONE and before >= 0 and after >= 0:
                continue
            dx = step.ops.expand(dx, _partly(y, dx, axis), [axis])
            dx = step.ops.slice(
                dx, axis, max(before, 0), max(before, 0) + size + min(before, 0) + min(after, 0)
            )
            dx = step.ops.pad(dx, axis, max(-before, 0), max(-after, 0))
        else:
            numpy_mode = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}[mode]
            inner = np.arange(size)[max(-before, 0) : size - max(-after, 0)]
            copies = np.pad(inner, (max(before, 0), max(after, 0)), mode=numpy_mode)  # type: ignore[call-overload]
            dx = apply_along(step.ops, dx, axis, one_hot_rows([int(i) for i in copies], size).T)
    step.give(0, dx)


def _partly(y: Value, dx: Value, axis: int) -> Value:
    """The output as a model for expanding one axis of a gradient that is on its way to the input's sizes."""
    return Value(y.name, (*dx.shape[:axis], y.shape[axis], *dx.shape[axis + 1 :]), y.dtype)
