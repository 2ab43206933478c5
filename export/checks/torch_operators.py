"""ONNX operators as torch functions of any precision: the independent side of the parity check.

Each function takes the node's attributes and its input tensors and returns the output, or a tuple of them.
They are written for exactness, not speed, and share nothing with the derivative rules but the weights of
Resize.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Attributes = dict[str, Any]
Inputs = list[Tensor]
Operator = Callable[[Attributes, Inputs], "Tensor | tuple[Tensor, ...]"]
OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Operator], Operator]:
    def register(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


def integers(tensor: Tensor) -> list[int]:
    return [int(number) for number in tensor.reshape(-1)]


def given(inputs: Sequence[Tensor | None], i: int) -> Tensor | None:
    return inputs[i] if i < len(inputs) else None


# -- element by element -------------------------------------------------------------------------

_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Erf": torch.erf,
    "Softplus": F.softplus, "Softsign": F.softsign, "HardSwish": F.hardswish, "Mish": F.mish,
    "Neg": torch.neg, "Abs": torch.abs, "Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal,
    "Exp": torch.exp, "Log": torch.log, "Sin": torch.sin, "Cos": torch.cos, "Floor": torch.floor,
    "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign, "Not": torch.logical_not,
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Pow": torch.pow,
    "Equal": torch.eq, "Greater": torch.gt, "Less": torch.lt, "GreaterOrEqual": torch.ge,
    "LessOrEqual": torch.le, "And": torch.logical_and, "Or": torch.logical_or,
    "Where": torch.where, "MatMul": torch.matmul,
}  # fmt: skip


def _plain(function: Callable[..., Tensor]) -> Operator:
    return lambda a, x: function(*x)


OPERATORS.update({name: _plain(function) for name, function in _PLAIN.items()})


@operator("Div")
def _div(a: Attributes, x: Inputs) -> Tensor:
    if x[0].is_floating_point():
        return x[0] / x[1]
    return torch.div(x[0], x[1], rounding_mode="trunc")


@operator("Max", "Min", "Sum", "Mean")
def _many(a: Attributes, x: Inputs) -> Tensor:
    combine = {"Max": torch.maximum, "Min": torch.minimum}.get(a["op"], torch.add)
    total = x[0]
    for other in x[1:]:
        total = combine(total, other)
    return total / len(x) if a["op"] == "Mean" else total


@operator("Clip")
def _clip(a: Attributes, x: Inputs) -> Tensor:
    low, high = given(x, 1), given(x, 2)
    y = x[0]
    # strict inequality, as torch's ReLU6: no gradient at the bounds themselves
    if low is not None:
        y = torch.where(y > low, y, low.to(y.dtype))
    return torch.where(y < high, y, high.to(y.dtype)) if high is not None else y


@operator("LeakyRelu", "PRelu", "ThresholdedRelu")
def _leaky(a: Attributes, x: Inputs) -> Tensor:
    if a["op"] == "ThresholdedRelu":
        return torch.where(x[0] > a.get("alpha", 1.0), x[0], 0.0)
    slope = x[1] if a["op"] == "PRelu" else a.get("alpha", 0.01)
    return torch.where(x[0] > 0, x[0], slope * x[0])


@operator("Elu", "Celu", "Selu")
def _elu(a: Attributes, x: Inputs) -> Tensor:
    if a["op"] == "Celu":
        return F.celu(x[0], a.get("alpha", 1.0))
    alpha = a.get("alpha", 1.0 if a["op"] == "Elu" else 1.6732632423543772)
    gamma = a.get("gamma", 1.0507009873554805) if a["op"] == "Selu" else 1.0
    return gamma * torch.where(x[0] > 0, x[0], alpha * torch.expm1(torch.clamp(x[0], max=0)))


@operator("HardSigmoid")
def _hard_sigmoid(a: Attributes, x: Inputs) -> Tensor:
    return torch.clamp(a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5), 0, 1)


@operator("Softmax", "LogSoftmax")
def _softmax(a: Attributes, x: Inputs) -> Tensor:
    function = torch.softmax if a["op"] == "Softmax" else torch.log_softmax
    return function(x[0], a.get("axis", -1))


@operator("Cast")
def _cast(a: Attributes, x: Inputs) -> Tensor:
    if a["to"] in (1, 10, 11, 16):  # every float becomes the precision of the check
        return x[0].to(a["precision"])
    return x[0].to(
        {6: torch.int32, 7: torch.int64, 9: torch.bool, 2: torch.uint8, 3: torch.int8}[a["to"]]
    )


@operator("CastLike")
def _cast_like(a: Attributes, x: Inputs) -> Tensor:
    return x[0].to(x[1].dtype)


# -- contractions -------------------------------------------------------------------------------


@operator("Gemm")
def _gemm(a: Attributes, x: Inputs) -> Tensor:
    left = x[0].T if a.get("transA") else x[0]
    right = x[1].T if a.get("transB") else x[1]
    y: Tensor = a.get("alpha", 1.0) * (left @ right)
    bias = given(x, 2)
    return y + a.get("beta", 1.0) * bias if bias is not None else y


@operator("Einsum")
def _einsum(a: Attributes, x: Inputs) -> Tensor:
    return torch.einsum(a["equation"], *x)


def _pads(a: Attributes, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    rank = len(kernel)
    auto = a.get("auto_pad", "NOTSET")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * (2 * rank) if auto == "VALID" else a.get("pads", [0] * (2 * rank))
        return pads[:rank], pads[rank:]
    begin, end = [], []
    for i, k in enumerate(kernel):
        stride, dilation = a.get("strides", [1] * rank)[i], a.get("dilations", [1] * rank)[i]
        out = ceil(x.shape[2 + i] / stride)
        total = max(0, (out - 1) * stride + (k - 1) * dilation + 1 - x.shape[2 + i])
        begin.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
        end.append(total - begin[-1])
    return begin, end


def _padded(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    amounts = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
    return F.pad(x, amounts, value=value)


@operator("Conv")
def _conv(a: Attributes, x: Inputs) -> Tensor:
    w = x[1]
    rank = w.dim() - 2
    begin, end = _pads(a, x[0], w.shape[2:])
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    y: Tensor = function(
        _padded(x[0], begin, end), w, given(x, 2), a.get("strides", [1] * rank), 0,
        a.get("dilations", [1] * rank), a.get("group", 1),
    )  # fmt: skip
    return y


@operator("ConvTranspose")
def _conv_transpose(a: Attributes, x: Inputs) -> Tensor:
    w = x[1]
    rank = w.dim() - 2
    strides, extra = a.get("strides", [1] * rank), a.get("output_padding", [0] * rank)
    dilations = a.get("dilations", [1] * rank)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    y = function(x[0], w, None, strides, 0, 0, a.get("group", 1), dilations)
    begin, end = a.get("pads", [0] * (2 * rank))[:rank], a.get("pads", [0] * (2 * rank))[rank:]
    auto, wanted = a.get("auto_pad", "NOTSET"), a.get("output_shape")
    if wanted or auto.startswith("SAME"):
        begin, end = [], []
        for i in range(rank):
            out = wanted[-rank:][i] if wanted else x[0].shape[2 + i] * strides[i]
            total = max(0, y.shape[2 + i] + extra[i] - out)
            begin.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
            end.append(total - begin[-1])
    y = _padded(y, [-n for n in begin], [e - n for n, e in zip(end, extra, strict=True)])
    bias = given(x, 2)
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def windows_of(a: Attributes, x: Tensor, fill: float) -> Tensor:
    """[N, C, out…, K] with every pixel under each window; `fill` outside."""
    kernel = a["kernel_shape"]
    rank = len(kernel)
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    begin, end = _pads(a, x, kernel)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    more = list(end)
    for i in range(rank):
        size = x.shape[2 + i] + begin[i] + end[i] - reach[i]
        out = size // strides[i] + 1
        if (
            a.get("ceil_mode")
            and size % strides[i]
            and out * strides[i] < x.shape[2 + i] + begin[i]
        ):
            out += 1
        more[i] = (out - 1) * strides[i] + reach[i] - x.shape[2 + i] - begin[i]
    y = _padded(x, begin, more, fill)
    for i in range(rank):
        y = y.unfold(2 + i, reach[i], strides[i])
    for i in range(rank):
        y = y.index_select(2 + rank + i, torch.arange(0, reach[i], dilations[i]))
    return y.flatten(2 + rank)


@operator("MaxPool")
def _max_pool(a: Attributes, x: Inputs) -> Tensor:
    windows = windows_of(a, x[0], -torch.inf)
    first = (windows == windows.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1, keepdim=True)
    return windows.gather(-1, first).squeeze(-1)


@operator("AveragePool")
def _average_pool(a: Attributes, x: Inputs) -> Tensor:
    total = windows_of(a, x[0], 0.0).sum(-1)
    ones = torch.ones_like(x[0][:1, :1])
    if a.get("count_include_pad"):
        begin, end = _pads(a, x[0], a["kernel_shape"])
        rank = len(begin)
        ones = _padded(ones, begin, end, 1.0)
        a = {**a, "pads": [0] * (2 * rank), "auto_pad": "NOTSET"}
    count = windows_of(a, ones, 0.0).sum(-1)
    sizes = tuple(slice(0, n) for n in total.shape[2:])
    return total / count[(slice(None), slice(None), *sizes)]


# -- normalisations -----------------------------------------------------------------------------


@operator("BatchNormalization")
def _batch_norm(a: Attributes, x: Inputs) -> Tensor:
    return F.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=a.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(a: Attributes, x: Inputs) -> Tensor:
    axis = a.get("axis", -1) % x[0].dim()
    return F.layer_norm(x[0], x[0].shape[axis:], x[1], given(x, 2), a.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(a: Attributes, x: Inputs) -> Tensor:
    return F.instance_norm(x[0], weight=x[1], bias=x[2], eps=a.get("epsilon", 1e-5))


@operator("LRN")
def _lrn(a: Attributes, x: Inputs) -> Tensor:
    size = a["size"]
    squares = F.pad((x[0] ** 2).movedim(1, -1), ((size - 1) // 2, size // 2))
    total = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    scale = a.get("bias", 1.0) + a.get("alpha", 1e-4) / size * total
    y: Tensor = x[0] / scale ** a.get("beta", 0.75)
    return y


@operator("LpNormalization")
def _lp_norm(a: Attributes, x: Inputs) -> Tensor:
    return F.normalize(x[0], a.get("p", 2), a.get("axis", -1), eps=1e-300)


# -- reductions ---------------------------------------------------------------------------------


def _reduce(a: Attributes, x: Tensor, axes: list[int], keep: bool) -> Tensor:
    match a["op"]:
        case "ReduceSum":
            return x.sum(axes, keepdim=keep)
        case "ReduceMean":
            return x.mean(axes, keepdim=keep)
        case "ReduceMax":
            return x.amax(axes, keepdim=keep)
        case "ReduceMin":
            return x.amin(axes, keepdim=keep)
        case "ReduceL1":
            return x.abs().sum(axes, keepdim=keep)
        case "ReduceL2":
            norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim=keep)
            return norm
        case "ReduceSumSquare":
            return (x * x).sum(axes, keepdim=keep)
        case "ReduceLogSum":
            return x.sum(axes, keepdim=keep).log()
        case _:
            return x.logsumexp(axes, keepdim=keep)


@operator(
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp",
)  # fmt: skip
def _reduction(a: Attributes, x: Inputs) -> Tensor:
    axes = given(x, 1)
    if axes is None or axes.numel() == 0:
        if a.get("noop_with_empty_axes"):
            return x[0]
        return _reduce(a, x[0], list(range(x[0].dim())), bool(a.get("keepdims", 1)))
    return _reduce(a, x[0], integers(axes), bool(a.get("keepdims", 1)))


@operator("GlobalAveragePool")
def _global_average(a: Attributes, x: Inputs) -> Tensor:
    return x[0].mean(list(range(2, x[0].dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max(a: Attributes, x: Inputs) -> Tensor:
    flat = x[0].flatten(2).max(2).values
    return flat.reshape(*flat.shape, *[1] * (x[0].dim() - 2))


@operator("CumSum")
def _cum_sum(a: Attributes, x: Inputs) -> Tensor:
    axis = int(x[1])
    y = x[0].flip(axis) if a.get("reverse") else x[0]
    y = y.cumsum(axis) - (y if a.get("exclusive") else 0)
    return y.flip(axis) if a.get("reverse") else y


@operator("ArgMax")
def _arg_max(a: Attributes, x: Inputs) -> Tensor:
    return x[0].argmax(a.get("axis", 0), keepdim=bool(a.get("keepdims", 1)))
