"""Any ONNX file under torch's autograd, in float64: the judge of the derivative rules.

The file is interpreted operator by operator; at activation kinks float32 autograd itself is off by more than
the rules are, so everything floating becomes float64. A network of some size has activations within float32's
rounding of a kink, and there float64 may take the other branch, with a derivative that differs by percents and
is no more right. `Anchors` therefore hold the float32 values on which the branches were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from edge_teacher.contract.errors import CheckFailed
from export.checks import torch_layout as _layout  # noqa: F401  (importing registers its operators)
from export.checks.torch_operators import OPERATORS

KINKED = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Selu", "Celu", "Clip", "HardSigmoid", "HardSwish"}
    | {"Abs", "Sign", "Floor", "Ceil", "Round", "Max", "Min", "MaxPool", "GlobalMaxPool", "ReduceMax"}
    | {"ReduceMin", "ReduceL1", "LpNormalization", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
    | {"ArgMax", "ArgMin", "TopK"}
)  # fmt: skip
"""Operators whose derivative, or whose result, jumps."""


class Anchors:
    """Tensors as float32 computed them, by name.

    `evaluate` puts the anchored number in the place of its own, and lets the gradient through unchanged: what
    comes after takes float32's branches. `worst` is the largest relative deviation it has put right.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.worst = 0.0

    def hold(self, name: str, value: Tensor) -> Tensor:
        anchor = self._tensors.get(name)
        if anchor is None:
            return value
        off = anchor.to(value.dtype) - value.detach()
        size = value.detach().abs().amax()
        self.worst = max(self.worst, float(off.abs().amax() / size) if size else 0.0)
        return value + off


class UnknownOperator(CheckFailed):
    """The interpreter has no torch function for an operator of the file."""


def evaluate(
    model: onnx.ModelProto,
    feeds: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    leaves: Sequence[str] = (),
    precision: torch.dtype = torch.float64,
    anchors: Anchors | None = None,
) -> dict[str, Tensor]:
    """Run an opset-18 model and return the tensors `names` and `leaves`.

    Gradients flow from the result back to `leaves`: each is cut from what made it. Raises UnknownOperator for
    an operator the interpreter does not know.
    """
    values: dict[str, Tensor] = {}
    for tensor in model.graph.initializer:
        values[tensor.name] = _floating(
            torch.from_numpy(numpy_helper.to_array(tensor).copy()), precision
        )
    for name, feed in feeds.items():
        values[name] = _floating(feed, precision)
    _cut(values, leaves, list(feeds))
    missing = {*names, *leaves} - set(values)
    for node in model.graph.node:
        if not missing:
            break
        if node.op_type not in OPERATORS or node.domain not in {"", "ai.onnx"}:
            raise UnknownOperator(
                f"the float64 check cannot run operator {node.op_type} at node {node.name!r}"
            )
        inputs: list[Any] = [values[name] if name else None for name in node.input]
        try:
            made = OPERATORS[node.op_type](_attributes(node, precision), inputs)
        except NotImplementedError as error:
            raise UnknownOperator(
                f"the float64 check cannot run operator {node.op_type} at node {node.name!r}: {error}"
            ) from error
        outputs = made if isinstance(made, tuple) else (made,)
        for name, value in zip(node.output, outputs, strict=False):
            values[name] = anchors.hold(name, value) if anchors else value
        _cut(values, leaves, list(node.output))
        missing -= set(node.output)
    return {name: values[name] for name in (*names, *leaves)}


def _cut(values: dict[str, Tensor], leaves: Sequence[str], made: Sequence[str]) -> None:
    for name in made:
        if name in leaves:
            values[name] = values[name].detach().clone().requires_grad_(True)


def _floating(tensor: Tensor, precision: torch.dtype) -> Tensor:
    return tensor.to(precision) if tensor.is_floating_point() else tensor


def _attributes(node: onnx.NodeProto, precision: torch.dtype) -> dict[str, Any]:
    attributes: dict[str, Any] = {"op": node.op_type, "precision": precision}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, onnx.TensorProto):
            value = _floating(torch.from_numpy(numpy_helper.to_array(value).copy()), precision)
        attributes[attribute.name] = value
    return attributes
