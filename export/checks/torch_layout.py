"""The operators of `torch_operators` that move, pick or resample numbers."""

from __future__ import annotations

from dataclasses import fields
from math import ceil, floor, prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from export.checks.torch_operators import Attributes, Inputs, given, integers, operator
from export.graph.rules.resize import Sampling


@operator("Identity", "Dropout")
def _identity(a: Attributes, x: Inputs) -> Tensor:
    return x[0]


@operator("Shape")
def _shape(a: Attributes, x: Inputs) -> Tensor:
    return torch.tensor(list(x[0].shape)[a.get("start", 0) : a.get("end")])


@operator("Size")
def _size(a: Attributes, x: Inputs) -> Tensor:
    return torch.tensor(x[0].numel())


@operator("Reshape")
def _reshape(a: Attributes, x: Inputs) -> Tensor:
    target = integers(x[1])
    if not a.get("allowzero"):
        target = [x[0].shape[i] if n == 0 else n for i, n in enumerate(target)]
    return x[0].reshape(target)


@operator("Flatten")
def _flatten(a: Attributes, x: Inputs) -> Tensor:
    axis = a.get("axis", 1)
    return x[0].reshape(prod(x[0].shape[:axis]), -1)


@operator("Squeeze")
def _squeeze(a: Attributes, x: Inputs) -> Tensor:
    axes = given(x, 1)
    return x[0].squeeze() if axes is None else x[0].squeeze(tuple(integers(axes)))


@operator("Unsqueeze")
def _unsqueeze(a: Attributes, x: Inputs) -> Tensor:
    rank = x[0].dim() + x[1].numel()
    y = x[0]
    for axis in sorted(axis % rank for axis in integers(x[1])):
        y = y.unsqueeze(axis)
    return y


@operator("Transpose")
def _transpose(a: Attributes, x: Inputs) -> Tensor:
    return x[0].permute(a.get("perm", list(reversed(range(x[0].dim())))))


@operator("Expand")
def _expand(a: Attributes, x: Inputs) -> Tensor:
    sizes = np.broadcast_shapes(tuple(x[0].shape), tuple(integers(x[1])))
    return x[0].expand(sizes)


@operator("Tile")
def _tile(a: Attributes, x: Inputs) -> Tensor:
    return x[0].tile(integers(x[1]))


@operator("Concat")
def _concat(a: Attributes, x: Inputs) -> Tensor:
    return torch.cat(x, a["axis"])


@operator("Split")
def _split(a: Attributes, x: Inputs) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    sizes = given(x, 1)
    if sizes is None:
        return torch.split(x[0], ceil(x[0].shape[axis] / a["num_outputs"]), axis)
    return torch.split(x[0], integers(sizes), axis)


@operator("Slice")
def _slice(a: Attributes, x: Inputs) -> Tensor:
    starts, ends = integers(x[1]), integers(x[2])
    axes = integers(x[3]) if given(x, 3) is not None else list(range(len(starts)))
    steps = integers(x[4]) if given(x, 4) is not None else [1] * len(starts)
    y = x[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        stop = None if step < 0 and end < -y.shape[axis] else end
        y = y.index_select(axis, torch.tensor(list(range(y.shape[axis])[start:stop:step])))
    return y


@operator("Gather")
def _gather(a: Attributes, x: Inputs) -> Tensor:
    axis = a.get("axis", 0) % x[0].dim()
    flat = x[0].index_select(axis, x[1].reshape(-1) % x[0].shape[axis])
    return flat.reshape([*x[0].shape[:axis], *x[1].shape, *x[0].shape[axis + 1 :]])


@operator("ScatterND")
def _scatter_nd(a: Attributes, x: Inputs) -> Tensor:
    if a.get("reduction", "none") != "none":
        raise NotImplementedError("ScatterND with a reduction")
    return x[0].index_put(tuple(x[1].unbind(-1)), x[2])


@operator("GatherND")
def _gather_nd(a: Attributes, x: Inputs) -> Tensor:
    if a.get("batch_dims", 0):
        raise NotImplementedError("GatherND with batch axes")
    return x[0][tuple(x[1].unbind(-1))]


@operator("Pad")
def _pad(a: Attributes, x: Inputs) -> Tensor:
    pads = integers(x[1])
    axes = given(x, 3)
    chosen = list(range(x[0].dim())) if axes is None else integers(axes)
    value = given(x, 2)
    y = x[0]
    for i, axis in enumerate(chosen):
        before, after = pads[i], pads[i + len(chosen)]
        y = y.narrow(axis, max(-before, 0), y.shape[axis] - max(-before, 0) - max(-after, 0))
        before, after = max(before, 0), max(after, 0)
        size, position = y.shape[axis], torch.arange(-before, y.shape[axis] + after)
        match a.get("mode", "constant"):
            case "constant":
                edge = 0.0 if value is None else float(value)
                parts = [
                    y.new_full((*y.shape[:axis], n, *y.shape[axis + 1 :]), edge)
                    for n in (before, after)
                ]
                y = torch.cat([parts[0], y, parts[1]], axis)
            case "edge":
                y = y.index_select(axis, position.clamp(0, size - 1))
            case "wrap":
                y = y.index_select(axis, position % size)
            case _:
                period = max(1, 2 * (size - 1))
                folded = position.abs() % period
                y = y.index_select(axis, torch.where(folded < size, folded, period - folded))
    return y


@operator("Resize")
def _resize(a: Attributes, x: Inputs) -> Tensor:
    known = {field.name for field in fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in a.items() if name in known})
    scales, sizes = given(x, 2), given(x, 3)
    axes = [axis % x[0].dim() for axis in a.get("axes", range(x[0].dim()))]
    y = x[0]
    for i, axis in enumerate(axes):
        size = y.shape[axis]
        if sizes is not None and sizes.numel():
            out = int(sizes[i])
            scale = out / size
        elif scales is not None:
            scale = float(scales[i])
            out = floor(np.float32(size) * np.float32(scale))  # as the runtimes multiply
        if out != size or scale != 1:
            matrix = torch.from_numpy(sampling.matrix(size, out, scale)).to(y.dtype)
            y = (
                (matrix @ y.movedim(axis, -2)).movedim(-2, axis)
                if axis != y.dim() - 1
                else y @ matrix.T
            )
    return y


@operator("DepthToSpace")
def _depth_to_space(a: Attributes, x: Inputs) -> Tensor:
    n, c, h, w = x[0].shape
    b = a["blocksize"]
    if a.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x[0], b)
    y = x[0].reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def _space_to_depth(a: Attributes, x: Inputs) -> Tensor:
    n, c, h, w = x[0].shape
    b = a["blocksize"]
    y = x[0].reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * b**2, h // b, w // b)


@operator("ConstantOfShape")
def _constant_of_shape(a: Attributes, x: Inputs) -> Tensor:
    value = a.get("value", torch.zeros(1, dtype=a["precision"]))
    return torch.full(integers(x[0]), value.reshape(-1)[0].item(), dtype=value.dtype)


@operator("Range")
def _range(a: Attributes, x: Inputs) -> Tensor:
    return torch.arange(*(float(n) if n.is_floating_point() else int(n) for n in x)).to(x[0].dtype)
