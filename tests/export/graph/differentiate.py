"""Compares the gradient a rule writes with float64 autograd, per image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper, parser

from export.checks.autograd import evaluate
from export.graph.emit import Ops, Value
from export.graph.gradient import gradients
from export.graph.network import Network, measure, session
from export.graph.opset import to_opset18
from export.graph.shapes import BATCH, ONE

TOLERANCE = 1e-5
torch.set_num_threads(1)


def model_of(
    body: str,
    x: tuple[int, ...],
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = 18,
    out: str = "y",
) -> onnx.ModelProto:
    """`body` in ONNX text with one input x [N, *x] and output y; weights become initialisers."""
    sizes = ", ".join(["N", *map(str, x)])
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> net (float[{sizes}] x) => (float {out}) {{ {body} }}'
    model = parser.parse_model(text)
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def random(*shape: int, seed: int = 0, low: float | None = None) -> np.ndarray:
    generator = np.random.default_rng([seed, *shape])
    if low is not None:
        return generator.uniform(low, low + 1, shape).astype(np.float32)
    return generator.standard_normal(shape).astype(np.float32)


def gradient_model(
    network: Network, wrt: str, of: str, narrow: tuple[int, ...] = ()
) -> onnx.ModelProto:
    """A model (x, seed) -> gradient; the seed is given under-broadcast along the axes in `narrow`."""
    y = network.value(of)
    shape = tuple(ONE if axis in narrow else dim for axis, dim in enumerate(y.shape))
    ops = Ops("gradient")
    found = gradients(network, ops, {of: Value("seed", shape, y.dtype)}, [wrt])[wrt]
    found = ops.expand(found, network.value(wrt))
    graph = helper.make_graph(
        [*network.nodes, *ops.nodes],
        "derivative",
        [
            *network.model.graph.input,
            helper.make_tensor_value_info("seed", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info(found.name, found.dtype, [None] * found.rank)],
        [*network.model.graph.initializer, *ops.initializers.values()],
    )
    del graph.input[1].type.tensor_type.shape.dim[:]
    for dim in shape:
        entry = graph.input[1].type.tensor_type.shape.dim.add()
        if dim == BATCH:
            entry.dim_param = "N"
        elif not dim.batched:
            entry.dim_value = dim.size
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def worst_error(
    model: onnx.ModelProto,
    x: np.ndarray,
    *,
    wrt: str = "x",
    of: str = "y",
    narrow: tuple[int, ...] = (),
    seed: int = 1,
) -> float:
    """The largest relative error over the images of one batch, against float64 autograd.

    Asserts on the way that the judge computes what ONNX Runtime computes.
    """
    native = to_opset18(model)
    for tensor in native.graph.input:
        tensor.type.tensor_type.shape.dim[0].dim_param = "N"
    if of not in [info.name for info in native.graph.output]:
        native.graph.output.append(onnx.ValueInfoProto(name=of))
    network = measure(native, "x", x.shape[1:])
    judged = evaluate(native, {"x": torch.from_numpy(x)}, [of], leaves=[wrt])
    y = judged[of]
    (forward,) = session(native).run([of], {"x": x})
    np.testing.assert_allclose(forward, y.detach().numpy(), rtol=1e-4, atol=1e-4)

    sizes = [1 if axis in narrow else size for axis, size in enumerate(y.shape)]
    start = random(*sizes, seed=seed)
    if not y.requires_grad:
        expected = np.zeros(judged[wrt].shape)
    else:
        y.backward(torch.from_numpy(start).double().expand_as(y))
        expected = judged[wrt].grad.numpy()
    derivative = gradient_model(network, wrt, of, narrow)
    onnx.checker.check_model(derivative)
    (got,) = session(derivative).run(None, {"x": x, "seed": start})
    assert got.shape == expected.shape
    images = len(x)
    off = np.linalg.norm((got - expected).reshape(images, -1), axis=1)
    size = np.linalg.norm(expected.reshape(images, -1), axis=1)
    # A derivative that is exactly zero is judged against the size of the seed.
    return float(np.max(off / np.maximum(size, 0.05)))
