"""Saliency maps from gradients and feature maps.

Grad-CAM (Selvaraju et al., 2017) at a feature map A with channels c and pixels u: `alpha_c = mean_u
dy/dA_c(u)`, `M = relu(sum_c alpha_c A_c)`, min-max normalised per image; a flat map becomes zeros. Input
gradient (Simonyan et al., 2014): `M = max_c |dy/dx_c|`. Gradient times input (Shrikumar et al., 2016): `M =
|sum_c x_c dy/dx_c|`. Eigen-CAM (Muhammad & Yeasin, 2020): the projection of A on its first principal
direction; no gradient and no class.
"""

from __future__ import annotations

from math import isqrt, prod
from typing import Literal

import msgspec

from export.graph.emit import Ops, Value
from export.graph.errors import UnsupportedNetwork
from export.graph.shapes import BATCH, ONE, Dim, Shape, describe

Kind = Literal["gradcam", "input_gradient", "gradient_times_input", "eigencam"]
_POWER_STEPS = 12


class MapLayout(msgspec.Struct, frozen=True):
    """Where channels and pixels are in a tapped tensor.

    `axes` is "NCHW", "NHWC" or "NTC" (tokens). For tokens the first `skip` (class and register tokens) are no
    pixels, and the others are `size` = (h, w) in row-major order.
    """

    axes: Literal["NCHW", "NHWC", "NTC"]
    size: tuple[int, int]
    skip: int = 0


def infer_layout(shape: Shape, name: str, image: tuple[int, int]) -> MapLayout:
    """The layout of a tap of this shape in a network with an image of (H, W).

    [N, C, h, w] unless only the first two sizes have the image's aspect; [N, T, C] with T = h w tokens, or up
    to eight more in front. Raises UnsupportedNetwork if nothing fits.
    """
    if shape[:1] != (BATCH,) or any(dim.batched for dim in shape[1:]):
        raise UnsupportedNetwork(
            f"tap {name!r} has shape {describe(shape)}, which does not start with the batch"
        )
    sizes = [dim.size for dim in shape[1:]]
    height, width = image
    if len(sizes) == 3:
        first, second = (sizes[0], sizes[1]), (sizes[1], sizes[2])
        if not _same_aspect(second, image) and _same_aspect(first, image):
            return MapLayout("NHWC", first)
        return MapLayout("NCHW", second)
    if len(sizes) == 2:
        for skip in range(9):
            rows = isqrt((sizes[0] - skip) * height // width)
            for h in (rows, rows + 1):
                if h > 0 and (sizes[0] - skip) % h == 0:
                    size = (h, (sizes[0] - skip) // h)
                    if _same_aspect(size, image) and min(size) > 1:
                        return MapLayout("NTC", size, skip)
    raise UnsupportedNetwork(
        f"tap {name!r} has shape {describe(shape)}, which is neither a map [N, C, h, w] nor "
        f"tokens [N, T, C] of an image of {height} x {width}; say which with `layout`"
    )


def _same_aspect(size: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a map has the aspect of the image, give or take the pixel that rounding costs."""
    return abs(size[0] * image[1] - size[1] * image[0]) < max(image)


def grad_cam(ops: Ops, tap: Value, gradient: Value, layout: MapLayout) -> Value:
    """[N, h, w] in [0, 1] from a feature map and the gradient towards it (which may be under-broadcast)."""
    maps, slopes = _pixels(ops, tap, layout), _pixels(ops, gradient, layout)
    if layout.axes == "NCHW":  # [N, C, P]
        alpha = ops.expand(ops.reduce("ReduceMean", slopes, [2]), maps, [1])
        total = ops.matmul(ops.swap_last(alpha), maps)
    else:  # [N, P, C]
        alpha = ops.expand(ops.reduce("ReduceMean", slopes, [1]), maps, [2])
        total = ops.matmul(maps, ops.swap_last(alpha))
    return _finish(ops, ops.unary("Relu", total), layout.size)


def eigen_cam(ops: Ops, tap: Value, layout: MapLayout) -> Value:
    """[N, h, w] in [0, 1]: |A v| for the first right singular vector v of A [pixels, channels].

    Power iteration on A^T A from the mean pixel; the sign of v is free, so the absolute value is taken.
    """
    maps = _pixels(ops, tap, layout)
    rows = ops.swap_last(maps) if layout.axes == "NCHW" else maps  # [N, P, C]
    columns = ops.swap_last(rows)
    v = ops.swap_last(ops.reduce("ReduceMean", rows, [1]))
    for _ in range(_POWER_STEPS):
        v = ops.matmul(columns, ops.matmul(rows, v))
        largest = ops.reduce("ReduceMax", ops.unary("Abs", v), [1])
        v = ops.div(v, ops.where(ops.greater(largest, 0), largest, 1))
    return _finish(ops, ops.unary("Abs", ops.matmul(rows, v)), layout.size)


def of_input(ops: Ops, x: Value, gradient: Value, kind: Kind, channel_axis: int) -> Value:
    """[N, H, W] in [0, 1] from the gradient towards the network's input."""
    if kind == "gradient_times_input":
        flat = ops.unary("Abs", ops.reduce("ReduceSum", ops.mul(gradient, x), [channel_axis]))
    else:
        flat = ops.reduce("ReduceMax", ops.unary("Abs", ops.expand(gradient, x)), [channel_axis])
    size = tuple(dim.size for axis, dim in enumerate(x.shape) if axis not in (0, channel_axis))
    return _finish(ops, flat, (size[0], size[1]))


def feature_map(ops: Ops, tap: Value, layout: MapLayout) -> Value:
    """The tap as [N, C, h, w], whatever its own layout: every teacher looks the same from outside."""
    if layout.axes == "NCHW":
        return tap
    if layout.axes == "NHWC":
        return ops.transpose(tap, [0, 3, 1, 2])
    rows = ops.swap_last(_pixels(ops, tap, layout))  # [N, C, P]
    return ops.reshape(rows, (*rows.shape[:2], Dim(layout.size[0]), Dim(layout.size[1])))


def _pixels(ops: Ops, x: Value, layout: MapLayout) -> Value:
    """[N, C, P] or [N, P, C]: one axis for all pixels; an under-broadcast pair of axes stays one of size 1."""
    if layout.axes == "NTC":
        end = layout.skip + prod(layout.size)
        return x if x.shape[1] == ONE else ops.slice(x, 1, layout.skip, end)
    spatial = [2, 3] if layout.axes == "NCHW" else [1, 2]
    narrow = [x.shape[axis] == ONE for axis in spatial]
    if any(narrow) and not all(narrow):  # the mean over an under-broadcast axis is the value itself
        x = ops.reduce("ReduceMean", x, spatial)
    pixels = Dim(prod(x.shape[axis].size for axis in spatial))
    if layout.axes == "NCHW":
        return ops.reshape(x, (x.shape[0], x.shape[1], pixels))
    return ops.reshape(x, (x.shape[0], pixels, x.shape[3]))


def _finish(ops: Ops, positive: Value, size: tuple[int, int]) -> Value:
    """Min-max per image, as float32 [N, h, w]; a flat map becomes zeros."""
    flat = ops.reshape(positive, (BATCH, Dim(prod(size))))
    flat = ops.cast(flat, 1)
    low, high = ops.reduce("ReduceMin", flat, [1]), ops.reduce("ReduceMax", flat, [1])
    span = ops.sub(high, low)
    span = ops.where(ops.greater(span, 0), span, 1)
    unit = ops.div(ops.sub(flat, low), span)
    return ops.reshape(unit, (BATCH, Dim(size[0]), Dim(size[1])))
