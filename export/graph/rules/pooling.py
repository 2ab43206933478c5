"""Sliding-window pooling.

AveragePool is linear along each axis: y = A_h x A_w^T with rows that hold 1/count over one window. MaxPool
hands dy to the first largest pixel of its window. With x_k the input seen at offset k of every window (a
strided slice), the pixel at offset k wins where x_k = y and no earlier one did; its share goes back to where
it came from by the transposed slice. No operator counts ties twice, and none needs MaxPool's Indices.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from export.graph.emit import BOOL, Ops, Value
from export.graph.registry import Step, rule
from export.graph.rules.convolution import Geometry, geometry
from export.graph.rules.matrices import Matrix
from export.graph.rules.resize import spread
from export.graph.shapes import ONE, Dim


@rule("AveragePool")
def average_pool(step: Step) -> None:
    """dx = A_h^T dy A_w."""
    window = geometry(step, step.attribute("kernel_shape", [0]))
    include = bool(step.attribute("count_include_pad", 0))
    dx = step.dy
    for axis in range(len(window.kernel)):
        size, out = step.x().shape[2 + axis].size, step.y().shape[2 + axis].size
        dx = spread(step.ops, dx, 2 + axis, _average_matrix(window, axis, size, out, include))
    step.give(0, dx)


def _average_matrix(window: Geometry, axis: int, size: int, out: int, include_pad: bool) -> Matrix:
    """[out, size]: 1/count for the pixels under each window; padding counts only if `include_pad`."""
    matrix = np.zeros((out, size))
    for row in range(out):
        start = row * window.strides[axis] - window.begin[axis]
        pixels = [start + k * window.dilations[axis] for k in range(window.kernel[axis])]
        inside = [pixel for pixel in pixels if 0 <= pixel < size]
        counted = [pixel for pixel in pixels if pixel < size + window.end[axis]]
        matrix[row, inside] = 1 / (len(counted) if include_pad else max(1, len(inside)))
    return matrix


@rule("MaxPool")
def max_pool(step: Step) -> None:
    ops, x, y = step.ops, step.x(), step.y()
    window = geometry(step, step.attribute("kernel_shape", [0]))
    if step.attribute("storage_order", 0):
        step.refuse("column-major storage_order has no rule")
    axes = range(2, x.rank)
    offsets = list(product(*(range(k) for k in window.kernel)))
    left = step.dy  # what of dy no earlier offset has taken
    phases: dict[tuple[int, ...], Value] = {}
    padded = _pad_with_lowest(step, window)
    for number, offset in enumerate(offsets):
        seen = padded
        for axis, k in zip(axes, offset, strict=True):
            start = k * window.dilations[axis - 2]
            stride, out = window.strides[axis - 2], y.shape[axis].size
            seen = ops.slice(seen, axis, start, start + (out - 1) * stride + 1, stride)
        wins = ops.binary("Equal", seen, y)
        taken = ops.where(wins, left, 0)
        if number + 1 < len(offsets):
            left = ops.where(wins, 0, left)
        _add_shifted(ops, phases, taken, offset, window)
    _give_phases(step, window, phases, padded)


def _pad_with_lowest(step: Step, window: Geometry) -> Value:
    """x with borders that win nowhere, wide enough for every window (ceil mode may reach past the pads)."""
    x, y = step.x(), step.y()
    pads = [0] * (2 * x.rank)
    shape = list(x.shape)
    for axis in range(2, x.rank):
        i = axis - 2
        reach = (y.shape[axis].size - 1) * window.strides[i] + window.reach(i)
        pads[axis] = window.begin[i]
        pads[axis + x.rank] = max(0, reach - window.begin[i] - x.shape[axis].size)
        shape[axis] = Dim(x.shape[axis].size + pads[axis] + pads[axis + x.rank])
    if not any(pads):
        return x
    dtype = np.float16 if x.dtype == 10 else np.float32
    lowest = step.ops.constant(np.finfo(dtype).min, x.dtype)
    return step.ops.emit("Pad", [x, step.ops.constant(pads), lowest], tuple(shape))


def _add_shifted(
    ops: Ops,
    phases: dict[tuple[int, ...], Value],
    taken: Value,
    offset: tuple[int, ...],
    window: Geometry,
) -> None:
    """Window o at offset k covers pixel s o + d k: phase (d k mod s), shifted by (d k div s)."""
    rank, spatial = taken.rank, len(offset)
    reach = [k * d for k, d in zip(offset, window.dilations, strict=True)]
    phase = tuple(r % s for r, s in zip(reach, window.strides, strict=True))
    for i in range(spatial):
        longest = (window.reach(i) - 1 - phase[i]) // window.strides[i]
        shift = reach[i] // window.strides[i]
        taken = ops.pad(taken, rank - spatial + i, shift, longest - shift)
    phases[phase] = ops.add(phases[phase], taken) if phase in phases else taken


def _give_phases(
    step: Step, window: Geometry, phases: dict[tuple[int, ...], Value], padded: Value
) -> None:
    """Interleave the phases into one map of the padded input's size, and cut the padding off."""
    ops, x = step.ops, step.x()
    strides = window.strides
    spatial = len(strides)
    longest = [max(part.shape[2 + i].size for part in phases.values()) for i in range(spatial)]
    some = next(iter(phases.values()))
    full = (*some.shape[:2], *(Dim(n) for n in longest))
    parts = []
    for phase in product(*(range(s) for s in strides)):
        part = phases.get(phase)
        if part is None:
            part = ops.where(ops.constant(False, BOOL), some, 0)
        for i in range(spatial):
            part = ops.pad(part, 2 + i, 0, longest[i] - part.shape[2 + i].size)
        parts.append(ops.reshape(part, (*part.shape[:2], ONE, *part.shape[2:])))
    # [N, C, s1 s2 …, o1, o2, …] -> [N, C, o1, s1, o2, s2, …]
    stacked = ops.concat(parts, 2)
    split = ops.reshape(stacked, (*full[:2], *(Dim(s) for s in strides), *full[2:]))
    perm = [0, 1, *(axis for i in range(spatial) for axis in (2 + spatial + i, 2 + i))]
    sizes = [n * s for n, s in zip(longest, strides, strict=True)]
    dx = ops.reshape(ops.transpose(split, perm), (*full[:2], *(Dim(n) for n in sizes)))
    for i in range(spatial):
        size, begin = x.shape[2 + i].size, window.begin[i]
        dx = ops.pad(dx, 2 + i, 0, max(0, begin + size - sizes[i]))
        dx = ops.slice(dx, 2 + i, begin, begin + size)
    step.give(0, dx)
