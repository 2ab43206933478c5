"""How far an image keeps from the kinks of a network.

A derivative jumps where an activation crosses zero or another pixel becomes a window's largest. An exporter
folds batch normalisation into float32 weights, so the file and the module it came from differ by some 1e-7: an
activation that lies within that of a kink is on one side in the file and on the other in the module, and the
two derivatives then differ by percents although both are right. Comparisons with a module are made on images
that keep a distance.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from export.checks.autograd import evaluate
from export.checks.parity import network_input
from export.checks.torch_operators import given, windows_of
from export.graph import InputSpec
from export.graph.emit import FLOATS
from export.graph.network import Network

DISTANCE = 2e-6
"""Relative to the root mean square of the tensor: ten times what the folding was seen to move it."""

_AT_ZERO = {"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Abs"}
_SMOOTH = {
    "Add", "BatchNormalization", "Concat", "Constant", "Conv", "ConvTranspose", "Div", "Erf", "Exp", "Expand",
    "AveragePool", "Flatten", "Gather", "Gemm", "GlobalAveragePool", "Identity", "InstanceNormalization",
    "LayerNormalization", "MatMul", "Mul", "Pow", "ReduceMean", "ReduceSum", "Reshape", "Resize", "Sigmoid",
    "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Shape", "Cast",
    "Pad", "Softplus", "Neg",
}  # fmt: skip


def distances(network: Network, x: Tensor) -> np.ndarray:
    """For every image the smallest distance of any activation from a kink, [N]; infinite without kinks."""
    floating = {name for name, value in network.values.items() if value.dtype in FLOATS}
    kinked = [
        node
        for node in network.nodes
        if node.op_type not in _SMOOTH and floating.intersection(node.output)
    ]
    wanted = list(dict.fromkeys(name for node in kinked for name in node.input if name))
    values = evaluate(network.model, {network.input_name: x}, wanted)
    closest = np.full(len(x), np.inf)
    for node in kinked:
        inputs = [values[name] if name else None for name in node.input]
        gap = _gap(node, inputs).reshape(len(x), -1).amin(1)
        assert inputs[0] is not None
        scale = (inputs[0] ** 2).mean().sqrt()
        closest = np.minimum(closest, (gap / scale).numpy())
    return closest


def _gap(node: onnx.NodeProto, x: list[Tensor | None]) -> Tensor:
    first = x[0]
    assert first is not None
    if node.op_type in _AT_ZERO:
        return first.abs()
    if node.op_type == "Clip":
        bounds = [bound for i in (1, 2) if (bound := given(x, i)) is not None]
        return torch.stack([(first - bound).abs() for bound in bounds]).amin(0)
    if node.op_type == "HardSwish":
        return (first.abs() - 3).abs()
    if node.op_type == "HardSigmoid":
        a = {attribute.name: attribute.f for attribute in node.attribute}
        y = a.get("alpha", 0.2) * first + a.get("beta", 0.5)
        return torch.minimum(y.abs(), (y - 1).abs())
    if node.op_type == "MaxPool":
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        best, second = windows_of(attributes, first, -torch.inf).topk(2, -1).values.unbind(-1)
        # Equal to the last bit, as zeros after a Relu are: the first one wins in every precision.
        return torch.where(best == second, torch.inf, best - second)
    raise AssertionError(f"say where operator {node.op_type} has kinks, or that it is smooth")


def keeping_away(network: Network, images: np.ndarray, count: int, spec: InputSpec) -> np.ndarray:
    """The first `count` of the images, uint8[N, H, W, 3], that keep `DISTANCE`."""
    x = torch.from_numpy(network_input(spec, images)).double()
    far = images[distances(network, x) > DISTANCE]
    assert len(far) >= count, f"only {len(far)} of {len(images)} images keep away from kinks"
    return far[:count]
