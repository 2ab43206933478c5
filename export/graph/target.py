"""What is explained: one scalar per image, made from the network's logits.

The scalar is linear in the logits once the choice of class is made, so its gradient towards them, the *seed*,
is a one-hot pattern computed from the logits themselves. For a dense head the scalar is a reduction:

    top1        the largest logit (classifiers)
    mean        the class whose logits are largest on average over all positions, averaged over them
                (segmentation)
    best_path   at every position the largest logit, averaged over positions (sequences, OCR)
    max         the single largest logit of any class at any position (detection)

With a given class, that class takes the place of the largest one.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import onnx

from export.graph.emit import FLOATS, INT64, Ops, Value
from export.graph.errors import UnsupportedNetwork
from export.graph.network import Network
from export.graph.shapes import BATCH, ONE, Dim, describe

Reduction = Literal["top1", "mean", "best_path", "max"]
_MOVES = {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast"}
_SQUASHES = {"Softmax", "Sigmoid"}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Pow", "Exp"}
_KEEPS_ORDER = {"Softmax", "LogSoftmax", "Sigmoid", "Identity", "Cast", "ArgMax"}


class Target(msgspec.Struct, frozen=True):
    """Which scalar per image is explained.

    `class_index`: None for the network's own choice. `reduction` and `class_axis`: None to follow the rank of
    the logits: [N, K] top1; [N, T, K] best_path, axis 2; [N, K, h, w] mean, axis 1.
    """

    class_index: int | None = None
    reduction: Reduction | None = None
    class_axis: int | None = None


def find_logits(network: Network, outputs: list[str]) -> str:
    """The tensor of class scores that the network's outputs are made of, before any softmax, sigmoid or argmax.

    Raises UnsupportedNetwork if there are several, or none.
    """
    candidates = []
    ends = [name for output in outputs if network.has(output) for name in _ends(network, output)]
    for name in ends or _suppressed(network):
        if network.has(name) and _has_classes(network.value(name)) and name not in candidates:
            candidates.append(name)
    if not candidates and len(outputs) == 1:
        # A binary head: its one score is explained, whichever way it goes.
        only = _before_softmax(network, outputs[0])
        if network.has(only) and network.value(only).shape == (BATCH, ONE):
            return only
    flat = [name for name in candidates if network.value(name).rank == 2]
    chosen = flat if len(flat) == 1 else candidates
    if len(chosen) != 1:
        which = f"the tensors {candidates}" if candidates else f"the outputs {outputs}"
        raise UnsupportedNetwork(
            f"cannot tell which of {which} holds the logits; name the tensor with `logits`"
        )
    return chosen[0]


def _ends(network: Network, output: str) -> list[str]:
    """The class scores one output is made of: itself before its softmax, or a part of a detector's."""
    name = _before_softmax(network, output)
    if not _has_classes_of(network, name):
        return []
    return [_scores_beside_boxes(network, name) or name]


def _has_classes_of(network: Network, name: str) -> bool:
    return network.has(name) and _has_classes(network.value(name))


def _scores_beside_boxes(network: Network, name: str) -> str | None:
    """A one-stage detector joins boxes and squashed scores: the scores before that, if there is one such part.

    Raises UnsupportedNetwork, naming them, if there are several, as with a head at every level.
    """
    parts = _joined(network, name)
    squashed = [
        _before_softmax(network, part) for part in parts if _made_by(network, part) in _SQUASHES
    ]
    if not squashed:
        makers = {_made_by(network, _uncut(network, part)) for part in parts}
        if makers & _SQUASHES and makers & _ARITHMETIC:
            # Cut from one squashed tensor and joined again: coordinates would compete with the scores.
            raise UnsupportedNetwork(
                f"output {name!r} joins boxes and scores; name the class scores, as they are before that, "
                "with `logits`"
            )
    if not squashed or len(squashed) == len(parts):
        return None
    if len(squashed) > 1:
        known = [f"{n!r} {describe(network.value(n).shape)}" for n in squashed if network.has(n)]
        raise UnsupportedNetwork(
            f"output {name!r} joins boxes and scores of several heads; name the class scores of one of them "
            f"with `logits`: {', '.join(known)}"
        )
    return squashed[0] if _has_classes_of(network, squashed[0]) else None


def _made_by(network: Network, name: str) -> str:
    node = network.producer.get(name)
    return node.op_type if node is not None else ""


def _uncut(network: Network, name: str) -> str:
    """What a part was cut from."""
    while (node := network.producer.get(name)) is not None and node.op_type in {
        "Slice",
        "Split",
        *_MOVES,
    }:
        name = node.input[0]
    return name


def _joined(network: Network, name: str) -> list[str]:
    """What was joined, at whatever depth, into a tensor; empty if nothing was."""
    parts: list[str] = []
    stack = [name]
    while stack:
        tensor = stack.pop()
        node = network.producer.get(tensor)
        if node is not None and node.op_type == "Concat":
            stack += reversed(node.input)
        elif node is not None and node.op_type in _MOVES:
            stack.append(node.input[0])
        else:
            parts.append(tensor)
    return parts if len(parts) > 1 else []


def _suppressed(network: Network) -> list[str]:
    """A detector that ends in NonMaxSuppression: the scores [N, K, boxes] it is given."""
    return [
        _before_softmax(network, node.input[1])
        for node in network.nodes
        if node.op_type == "NonMaxSuppression"
    ]


def settle(network: Network, logits: str, target: Target) -> Target:
    """`target` with what the network's own head says: the axis of its softmax; scores of independent
    detections (a sigmoid over [N, a, b]) are reduced by max."""
    for node in network.nodes:
        if logits not in node.input:
            continue
        if node.op_type in {"Softmax", "LogSoftmax", "ArgMax"} and target.class_axis is None:
            rank = network.value(logits).rank
            default = 0 if node.op_type == "ArgMax" else -1
            axis = next((a.i for a in node.attribute if a.name == "axis"), default) % rank
            if axis > 0:
                return msgspec.structs.replace(target, class_axis=axis)
        if node.op_type == "Sigmoid" and network.value(logits).rank == 3:
            if target.class_index is not None and target.class_axis is None:
                raise UnsupportedNetwork(
                    f"the scores {logits!r} have shape {describe(network.value(logits).shape)}, and nothing "
                    "says which axis holds the classes: say so with `class_axis` (--class-axis)"
                )
            reduction = target.reduction or "max"
            return msgspec.structs.replace(target, reduction=reduction)
    return target


def _has_classes(value: Value) -> bool:
    long = value.rank >= 2 and max(dim.size for dim in value.shape[1:]) > 1
    return long and value.shape[0] == BATCH and value.dtype in FLOATS


def _before_softmax(network: Network, name: str) -> str:
    """Walk back over operators that keep the order of the classes."""
    while (node := network.producer.get(name)) is not None:
        if node.op_type in _KEEPS_ORDER:
            name = node.input[0]
        elif (before := _flattened_softmax(network, node)) is not None:
            name = before
        else:
            break
    return name


def _flattened_softmax(network: Network, node: onnx.NodeProto) -> str | None:
    """The x of Reshape(Softmax(Flatten(x))) with the shape of x: a Softmax of before opset 13."""
    if node.op_type != "Reshape" or not network.has(node.output[0]):
        return None
    soft = network.producer.get(node.input[0])
    if soft is None or soft.op_type not in {"Softmax", "LogSoftmax", "Sigmoid"}:
        return None
    flat = network.producer.get(soft.input[0])
    if flat is None or flat.op_type not in {"Flatten", "Reshape"} or not network.has(flat.input[0]):
        return None
    x = str(flat.input[0])
    return x if network.value(x).shape == network.value(node.output[0]).shape else None


class Form(msgspec.Struct, frozen=True):
    """A target with nothing left open."""

    class_index: int | None
    reduction: Reduction
    class_axis: int
    positions: tuple[int, ...]
    """The axes that are neither batch nor classes and longer than 1."""


def resolve(sizes: tuple[int, ...], target: Target) -> Form:
    """The target for logits of these sizes (the batch first). Raises UnsupportedNetwork if it does not fit."""
    long_axes = [axis for axis in range(1, len(sizes)) if sizes[axis] != 1]
    axis = target.class_axis
    if axis is None:
        axis = _class_axis(sizes, long_axes)
    axis %= len(sizes)
    positions = tuple(other for other in long_axes if other != axis)
    reduction = target.reduction
    if reduction is None:
        reduction = "top1" if not positions else ("best_path" if len(sizes) == 3 else "mean")
    if reduction == "top1" and positions:
        raise UnsupportedNetwork(
            f"the logits have sizes {list(sizes[1:])} per image: a dense head needs the "
            "reduction mean, best_path or max"
        )
    if target.class_index is not None and not 0 <= target.class_index < sizes[axis]:
        raise UnsupportedNetwork(
            f"class {target.class_index} was asked for, and the logits have classes 0 to {sizes[axis] - 1}"
        )
    return Form(target.class_index, reduction, axis, positions)


def _class_axis(sizes: tuple[int, ...], long_axes: list[int]) -> int:
    """[N, T, K] has its classes last; so has [N, h, w, K] with square maps; else [N, K, h, w] is meant."""
    if len(long_axes) == 1:
        return long_axes[0]
    channels_last = len(sizes) == 4 and sizes[1] == sizes[2] != sizes[3]
    return len(sizes) - 1 if len(sizes) == 3 or channels_last else 1


def seed(network: Network, ops: Ops, logits: str, target: Target) -> Value:
    """d(scalar)/d(logits), possibly under-broadcast; the same rank as the logits."""
    value = network.value(logits)
    if value.rank < 2 or value.shape[0] != BATCH:
        raise UnsupportedNetwork(
            f"logits {logits!r} have shape {describe(value.shape)}; they must start "
            "with the batch and have classes"
        )
    form = resolve(tuple(dim.size for dim in value.shape), settle(network, logits, target))
    reduction, axis, positions = form.reduction, form.class_axis, form.positions
    classes = value.shape[axis].size
    if reduction == "max":
        return _strongest(ops, value, target.class_index, axis)
    scores = value if reduction == "best_path" else ops.reduce("ReduceMean", value, positions)
    if target.class_index is None:
        hot = _top(ops, scores, axis)
    else:
        index = ops.constant(np.full([1] * value.rank, target.class_index))
        hot = ops.one_hot(index, classes, axis, value.dtype)
    count = 1
    for other in positions:
        count *= value.shape[other].size
    return ops.mul(hot, 1 / count)


def _top(ops: Ops, scores: Value, axis: int) -> Value:
    """One-hot of the first largest entry along `axis`."""
    shape = tuple(ONE if other == axis else dim for other, dim in enumerate(scores.shape))
    index = ops.emit("ArgMax", [scores], shape, INT64, axis=axis, keepdims=1)
    return ops.one_hot(index, scores.shape[axis].size, axis, scores.dtype)


def _strongest(ops: Ops, value: Value, class_index: int | None, axis: int) -> Value:
    """One-hot of the first largest entry of the whole tensor, or of one class's slice of it."""
    part = value
    if class_index is not None:
        part = ops.slice(value, axis, class_index, class_index + 1)
    total = 1
    for dim in part.shape[1:]:
        total *= dim.size
    flat = ops.reshape(part, (part.shape[0], Dim(total)))
    hot = ops.reshape(_top(ops, flat, 1), part.shape)
    if class_index is None:
        return hot
    after = value.shape[axis].size - class_index - 1
    return ops.pad(hot, axis, class_index, after)
