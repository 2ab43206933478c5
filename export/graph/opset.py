"""Brings a model to opset 18, the oldest that every TensorRT in the field parses.

Upwards (11-17) and downwards (19 and later) each operator that changed meaning or form has one small
rewrite below; everything else only gained element types. A model older than 11 goes through
`onnx.version_converter` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, inliner, numpy_helper, version_converter

from export.graph.errors import UnsupportedNetwork, UnsupportedOperator

TARGET = 18
IR_VERSION = (
    8  # the IR that came with opset 18's contemporaries; every runtime in the field reads it
)
_OLDEST_NATIVE = 11

Node = onnx.NodeProto
Rewrite = Callable[["_Rewriter", Node], list[Node]]


def to_opset18(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` in opset 18 with local functions inlined; the argument is left alone.

    Raises UnsupportedNetwork for a model without the default operator domain, and UnsupportedOperator for an
    operator or attribute that opset 18 cannot say.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if copy.functions:
        copy = inliner.inline_local_functions(copy)
    version = _version(copy)
    if version < _OLDEST_NATIVE:
        try:
            copy = version_converter.convert_version(copy, _OLDEST_NATIVE)
        except Exception as error:
            raise UnsupportedNetwork(
                f"the model uses opset {version}, and onnx cannot convert it "
                f"to opset {_OLDEST_NATIVE} ({error}); export it again with opset 18"
            ) from error
        _asymmetric(copy.graph)
        version = _version(copy)
    _Rewriter(copy, version).rewrite(copy.graph)
    for entry in copy.opset_import:
        if entry.domain in {"", "ai.onnx"}:
            entry.version = TARGET
    copy.ir_version = IR_VERSION
    return copy


def _asymmetric(graph: onnx.GraphProto) -> None:
    """Upsample and Resize of before 11 knew one coordinate mode; onnx's converter leaves the later default."""
    for node in graph.node:
        if node.op_type == "Resize":
            for name, value in (
                ("coordinate_transformation_mode", "asymmetric"),
                ("nearest_mode", "floor"),
            ):
                _take(node, name)
                node.attribute.append(helper.make_attribute(name, value))


def _version(model: onnx.ModelProto) -> int:
    for entry in model.opset_import:
        if entry.domain in {"", "ai.onnx"}:
            return int(entry.version)
    raise UnsupportedNetwork(
        "the model imports no opset of the standard ONNX domain; export it with plain ONNX operators"
    )


class _Rewriter:
    """Rewrites the nodes of one graph from `version` to opset 18."""

    def __init__(self, model: onnx.ModelProto, version: int) -> None:
        self.version = version
        self._count = 0
        self._ranks: dict[str, int] = {}
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._stored[node.output[0]] = node.attribute[0].t
        if version < 13 and any(node.op_type in _FLATTENING for node in model.graph.node):
            inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
            known = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
            self._ranks = {
                info.name: len(info.type.tensor_type.shape.dim)
                for info in known
                if info.type.tensor_type.HasField("shape")
            }

    def rewrite(self, graph: onnx.GraphProto) -> None:
        nodes: list[Node] = []
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    self.rewrite(attribute.g)
            nodes += self._one(node)
        del graph.node[:]
        graph.node.extend(nodes)

    def _one(self, node: Node) -> list[Node]:
        if node.domain not in {"", "ai.onnx"}:
            return [node]
        if node.op_type == "GroupNormalization":
            return _group_norm(self, node)
        table = _UPGRADES if self.version < TARGET else _DOWNGRADES
        since, rewrite = table.get(node.op_type, (0, None))
        if rewrite and (self.version < since if self.version < TARGET else self.version >= since):
            return rewrite(self, node)
        if self.version > TARGET:
            _drop_newer_attributes(node, self.version)
        return [node]

    # -- what the rewrites use ----------------------------------------------------------------

    def name(self, node: Node, what: str) -> str:
        self._count += 1
        return f"opset18/{next(iter(node.output))}/{what}_{self._count}"

    def integers(self, node: Node, what: str, numbers: list[int]) -> Node:
        name = self.name(node, what)
        array = numpy_helper.from_array(np.asarray(numbers, np.int64), name)
        return helper.make_node("Constant", [], [name], name=name, value=array)

    def number(self, node: Node, what: str, number: float) -> Node:
        """A float32 scalar; `CastLike` makes it the type of the tensor it meets."""
        name = self.name(node, what)
        array = numpy_helper.from_array(np.asarray(number, np.float32), name)
        return helper.make_node("Constant", [], [name], name=name, value=array)

    def stored(self, node: Node, i: int) -> list[int] | None:
        """A stored integer input; None if it is absent or computed."""
        tensor = self._stored.get(node.input[i]) if i < len(node.input) else None
        return None if tensor is None else [int(n) for n in numpy_helper.to_array(tensor).ravel()]

    def rank(self, name: str) -> int | None:
        return self._ranks.get(name)


def _take(node: Node, name: str) -> onnx.AttributeProto | None:
    """Remove and return an attribute."""
    for i, attribute in enumerate(node.attribute):
        if attribute.name == name:
            taken = onnx.AttributeProto()
            taken.CopyFrom(attribute)
            del node.attribute[i]
            return taken
    return None


# -- upwards --------------------------------------------------------------------------------------


def _list_becomes_input(name: str, position: int) -> Rewrite:
    """An integer list moved from attribute `name` to input `position` (Squeeze 13, ReduceMean 18 …)."""

    def rewrite(rewriter: _Rewriter, node: Node) -> list[Node]:
        attribute = _take(node, name)
        if attribute is None:
            return [node]
        constant = rewriter.integers(node, name, list(attribute.ints))
        while len(node.input) < position:
            node.input.append("")
        node.input.append(constant.output[0])
        return [constant, node]

    return rewrite


def _split(rewriter: _Rewriter, node: Node) -> list[Node]:
    """Split 18 wants the sizes as an input, or the number of outputs as an attribute."""
    nodes = _list_becomes_input("split", 1)(rewriter, node)
    if len(node.input) < 2 or not node.input[1]:
        node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
    return nodes


def _flattening_softmax(rewriter: _Rewriter, node: Node) -> list[Node]:
    """Before 13, Softmax flattened to two axes at `axis` (default 1) and normalised over the second."""
    attribute = _take(node, "axis")
    axis = attribute.i if attribute else 1
    rank = rewriter.rank(node.input[0])
    last = -1 if rank is None else rank - 1
    if axis in (-1, last):
        node.attribute.append(helper.make_attribute("axis", -1))
        return [node]
    flat, soft, shape = (rewriter.name(node, what) for what in ("flat", "soft", "shape"))
    return [
        helper.make_node("Shape", [node.input[0]], [shape]),
        helper.make_node("Flatten", [node.input[0]], [flat], axis=axis),
        helper.make_node(node.op_type, [flat], [soft], name=node.name, axis=-1),
        helper.make_node("Reshape", [soft, shape], [node.output[0]]),
    ]


def _batch_norm(rewriter: _Rewriter, node: Node) -> list[Node]:
    """Before 14 the running statistics were optional outputs; in inference only the first output exists."""
    del node.output[1:]
    return [node]


def _dropout(rewriter: _Rewriter, node: Node) -> list[Node]:
    """Dropout 12 takes its ratio as an input; in inference it is the identity whatever the ratio."""
    _take(node, "ratio")
    return [node]


_FLATTENING = ("Softmax", "LogSoftmax", "Hardmax")
_REDUCTIONS = ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
_UPGRADES: dict[str, tuple[int, Rewrite]] = {
    **{f"Reduce{kind}": (18, _list_becomes_input("axes", 1)) for kind in _REDUCTIONS},
    "ReduceSum": (13, _list_becomes_input("axes", 1)),
    "Squeeze": (13, _list_becomes_input("axes", 1)),
    "Unsqueeze": (13, _list_becomes_input("axes", 1)),
    "Split": (18, _split),
    **dict.fromkeys(_FLATTENING, (13, _flattening_softmax)),
    "BatchNormalization": (14, _batch_norm),
    "Dropout": (12, _dropout),
}


# -- downwards ------------------------------------------------------------------------------------


def _drop_newer_attributes(node: Node, version: int) -> None:
    """Remove attributes opset 18 does not know, if they say what opset 18 does anyway."""
    try:
        schema = defs.get_schema(node.op_type, TARGET)
        newer = defs.get_schema(node.op_type, version)
    except defs.SchemaError as error:
        raise UnsupportedOperator(
            node.op_type, node.name, "it does not exist in opset 18"
        ) from error
    for attribute in list(node.attribute):
        if attribute.name in schema.attributes:
            continue
        value = helper.get_attribute_value(attribute)
        default = newer.attributes[attribute.name].default_value
        harmless = default.type != onnx.AttributeProto.UNDEFINED and (
            helper.get_attribute_value(default) == value
        )
        if attribute.name == "dilations":
            harmless = all(number == 1 for number in value)
        if not harmless:
            raise UnsupportedOperator(
                node.op_type,
                node.name,
                f"its attribute {attribute.name}={value!r} does not exist in opset 18",
            )
        node.attribute.remove(attribute)


def _gelu(rewriter: _Rewriter, node: Node) -> list[Node]:
    """gelu(x) = x/2 (1 + erf(x/sqrt 2)), or with tanh(sqrt(2/pi) (x + 0.044715 x^3)) in place of erf."""
    attribute = _take(node, "approximate")
    tanh = attribute is not None and attribute.s == b"tanh"
    x, y = node.input[0], node.output[0]
    nodes: list[Node] = []

    def op(kind: str, *inputs: str, out: str | None = None) -> str:
        name = out or rewriter.name(node, kind)
        nodes.append(helper.make_node(kind, list(inputs), [name], name=name))
        return name

    def number(value: float) -> str:
        nodes.append(rewriter.number(node, "number", value))
        return op("CastLike", nodes[-1].output[0], x)

    if tanh:
        cube = op("Mul", op("Mul", op("Mul", x, x), x), number(0.044715))
        inner = op("Tanh", op("Mul", op("Add", x, cube), number((2 / np.pi) ** 0.5)))
    else:
        inner = op("Erf", op("Mul", x, number(0.5**0.5)))
    op("Mul", op("Mul", x, number(0.5)), op("Add", inner, number(1.0)), out=y)
    return nodes


def _group_norm(rewriter: _Rewriter, node: Node) -> list[Node]:
    """Instance normalisation of [N, groups, …]; per-group scale before 21, per-channel since.

    At every opset, because TensorRT and older runtimes do not know the operator.
    """
    x, scale, bias = node.input
    groups = next(a.i for a in node.attribute if a.name == "num_groups")
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    nodes: list[Node] = []

    def op(kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        name = out or rewriter.name(node, kind)
        nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def integers(numbers: list[int]) -> str:
        nodes.append(rewriter.integers(node, "shape", numbers))
        return str(nodes[-1].output[0])

    def same(value: float) -> str:
        array = np.full(groups, value, np.float32)
        name = rewriter.name(node, "same")
        nodes.append(
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))
        )
        return op("CastLike", name, x)

    per_channel = rewriter.version >= 21
    flat = op("Reshape", x, integers([0, 0, -1]))
    inner = (same(1.0), same(0.0)) if per_channel else (scale, bias)
    grouped = op("Reshape", flat, integers([0, groups, -1]))
    unit = op("InstanceNormalization", grouped, *inner, epsilon=epsilon)
    y = op("Reshape", unit, op("Shape", flat))
    if per_channel:
        last = integers([1])
        y = op("Add", op("Mul", y, op("Unsqueeze", scale, last)), op("Unsqueeze", bias, last))
    op("Reshape", y, op("Shape", x), out=node.output[0])
    return nodes


def _wrapping_pad(rewriter: _Rewriter, node: Node) -> list[Node]:
    """Pad 19 can wrap around: the end of the axis before it, and its start after it."""
    if not any(a.name == "mode" and a.s == b"wrap" for a in node.attribute):
        return [node]
    pads = rewriter.stored(node, 1)
    if pads is None or min(pads) < 0:
        raise UnsupportedOperator(
            node.op_type, node.name, "it wraps around by amounts that are computed or negative"
        )
    half = len(pads) // 2
    axes = rewriter.stored(node, 3) or list(range(half))
    nodes: list[Node] = []

    def cut(x: str, axis: int, start: int, end: int) -> str:
        bounds = [rewriter.integers(node, "bound", [n]) for n in (start, end, axis)]
        name = rewriter.name(node, "cut")
        inputs = [x, *(bound.output[0] for bound in bounds)]
        nodes.extend([*bounds, helper.make_node("Slice", inputs, [name], name=name)])
        return name

    x = node.input[0]
    for axis, before, after in zip(axes, pads[:half], pads[half:], strict=True):
        if before == after == 0:
            continue
        parts = [cut(x, axis, -before, 2**62)] if before else []
        parts += [x, *([cut(x, axis, 0, after)] if after else [])]
        joined = rewriter.name(node, "joined")
        nodes.append(helper.make_node("Concat", parts, [joined], name=joined, axis=axis))
        x = joined
    nodes.append(helper.make_node("Identity", [x], [node.output[0]], name=node.name))
    return nodes


_DOWNGRADES: dict[str, tuple[int, Rewrite]] = {"Gelu": (20, _gelu), "Pad": (19, _wrapping_pad)}
