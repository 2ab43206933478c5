"""Random convolution, pooling and resizing geometries against float64 autograd: 610 of them.

A geometry is one node on a few hundred numbers; ten share a model and an input, because building a session
costs more than running it. A wrong one shows in the sum: errors are of order one, the tolerance is 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.graph.network import measure
from tests.export.graph.differentiate import (
    TOLERANCE,
    gradient_model,
    model_of,
    random,
    worst_error,
)

TOGETHER = 10
CHANNELS = 4
QUICK = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
Draw = Callable[..., object]


class Nodes:
    """Collects nodes that all read x, and joins what they make."""

    def __init__(self, x: tuple[int, ...]) -> None:
        self.x = x
        self.nodes: list = []
        self.initializers: list = []

    def add(self, op: str, *inputs: np.ndarray | None, **attributes: object) -> None:
        i = len(self.nodes)
        names = ["x"]
        for k, array in enumerate(inputs):
            names.append("" if array is None else f"w{i}_{k}")
            if array is not None:
                self.initializers.append(numpy_helper.from_array(array, names[-1]))
        self.nodes.append(helper.make_node(op, names, [f"y{i}"], name=f"{op}_{i}", **attributes))

    def model(self) -> ModelProto:
        flat = [helper.make_node("Flatten", [f"y{i}"], [f"f{i}"]) for i in range(len(self.nodes))]
        join = helper.make_node("Concat", [f"f{i}" for i in range(len(self.nodes))], ["y"], axis=1)
        graph = helper.make_graph(
            [*self.nodes, *flat, join],
            "geometries",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *self.x])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            self.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    def judge(self) -> None:
        assert worst_error(self.model(), random(2, *self.x)) < TOLERANCE


def each(draw: Draw, rank: int, low: int, high: int) -> list[int]:
    return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))


def plane(draw: Draw, low: int = 8, high: int = 12) -> tuple[int, ...]:
    """C, then one or two spatial sizes."""
    return (CHANNELS, *each(draw, draw(st.integers(1, 2)), low, high))


def window(
    draw: Draw, rank: int, *, dilated: bool = True, within: bool = False
) -> dict[str, list[int]]:
    """Kernel, strides, dilations and (asymmetric) pads for 8 pixels; pads below the kernel if `within`."""
    kernel = each(draw, rank, 1, 4)
    pads = each(draw, 2 * rank, 0, 2)
    if within:
        pads = [min(p, k - 1) for p, k in zip(pads, kernel * 2, strict=True)]
    attributes = {"kernel_shape": kernel, "strides": each(draw, rank, 1, 4), "pads": pads}
    return attributes | ({"dilations": each(draw, rank, 1, 2)} if dilated else {})


def all_windows_start_inside(attributes: dict[str, list[int]]) -> None:
    """In ceil mode ONNX Runtime's shape inference counts windows beyond the map; its kernels do not."""
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    attributes["pads"][rank:] = [0] * rank
    attributes["strides"] = [min(s, k) for s, k in zip(attributes["strides"], kernel, strict=True)]


@settings(QUICK, max_examples=15)
@given(st.data())
def test_conv(data: st.DataObject) -> None:
    nodes = Nodes(plane(data.draw))
    rank = len(nodes.x) - 1
    for _ in range(TOGETHER):
        attributes = window(data.draw, rank)
        group = data.draw(st.sampled_from([1, 1, 2, 4]))
        auto = data.draw(st.sampled_from([None, None, None, "SAME_UPPER", "SAME_LOWER", "VALID"]))
        if auto:
            del attributes["pads"]
            if auto != "VALID":
                del attributes["dilations"]  # ONNX Runtime and the standard differ on both together
            attributes["auto_pad"] = auto
        outs = group * data.draw(st.integers(1, 2))
        w = random(outs, CHANNELS // group, *attributes["kernel_shape"])
        nodes.add("Conv", w, group=group, **attributes)
    nodes.judge()


@settings(QUICK, max_examples=12)
@given(st.data())
def test_conv_transpose(data: st.DataObject) -> None:
    nodes = Nodes(plane(data.draw, 3, 6))
    rank = len(nodes.x) - 1
    for _ in range(TOGETHER):
        attributes = window(data.draw, rank)
        kernel, strides = attributes["kernel_shape"], attributes["strides"]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, attributes["dilations"], strict=True)]
        # a map of at least one pixel must remain
        attributes["pads"] = [
            min(p, (r - 1) // 2) for p, r in zip(attributes["pads"], reach * 2, strict=True)
        ]
        attributes["output_padding"] = [data.draw(st.integers(0, s - 1)) for s in strides]
        group = data.draw(st.sampled_from([1, 2, 4]))
        form = data.draw(
            st.sampled_from(["pads", "pads", "SAME_UPPER", "SAME_LOWER", "output_shape"])
        )
        if form.startswith("SAME") and all(r >= s for r, s in zip(reach, strides, strict=True)):
            del attributes["pads"], attributes["output_padding"]
            attributes["auto_pad"] = form
        elif form == "output_shape":
            del attributes["pads"], attributes["output_padding"]
            attributes["output_shape"] = [
                max(1, (n - 1) * s + r - data.draw(st.integers(0, 1)))
                for n, s, r in zip(nodes.x[1:], strides, reach, strict=True)
            ]
        nodes.add("ConvTranspose", random(CHANNELS, 2, *kernel), group=group, **attributes)
    nodes.judge()


@settings(QUICK, max_examples=12)
@given(st.data())
def test_max_pool(data: st.DataObject) -> None:
    nodes = Nodes(plane(data.draw))
    for _ in range(TOGETHER):
        attributes = window(data.draw, len(nodes.x) - 1, within=True)
        ceil_mode = data.draw(st.integers(0, 1))
        if ceil_mode:
            all_windows_start_inside(attributes)
        nodes.add("MaxPool", ceil_mode=ceil_mode, **attributes)
    nodes.judge()


@settings(QUICK, max_examples=10)
@given(st.data())
def test_average_pool(data: st.DataObject) -> None:
    nodes = Nodes(plane(data.draw))
    for _ in range(TOGETHER):
        attributes = window(data.draw, len(nodes.x) - 1, dilated=False, within=True)
        ceil_mode = data.draw(st.integers(0, 1))
        if ceil_mode:
            all_windows_start_inside(attributes)
        include = data.draw(st.integers(0, 1))
        nodes.add("AveragePool", ceil_mode=ceil_mode, count_include_pad=include, **attributes)
    nodes.judge()


TRANSFORMS = [
    "half_pixel",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "half_pixel_symmetric",
]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


@settings(QUICK, max_examples=12)
@given(st.data())
def test_resize(data: st.DataObject) -> None:
    nodes = Nodes((CHANNELS, *each(data.draw, 2, 5, 12)))
    for _ in range(TOGETHER):
        mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]))
        attributes: dict[str, object] = {"mode": mode}
        attributes["coordinate_transformation_mode"] = data.draw(st.sampled_from(TRANSFORMS))
        if mode == "nearest":
            attributes["nearest_mode"] = data.draw(st.sampled_from(ROUNDINGS))
        if data.draw(st.booleans()):
            scale = st.sampled_from([0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 2.3])
            scales = np.asarray([1, 1, data.draw(scale), data.draw(scale)], np.float32)
            nodes.add("Resize", None, scales, **attributes)
        else:
            sizes = np.asarray([CHANNELS, *each(data.draw, 2, 1, 20)], np.int64)
            nodes.add("Resize", None, None, sizes, axes=[1, 2, 3], **attributes)
    nodes.judge()


@pytest.mark.parametrize("narrow", [(2,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [3, 3]}),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ],
)
def test_pooling_under_a_narrow_gradient(
    op: str, attributes: dict, narrow: tuple[int, ...]
) -> None:
    nodes = Nodes((CHANNELS, 8, 8))
    nodes.add(op, **attributes)
    model = nodes.model()
    assert worst_error(model, random(2, *nodes.x), of="y0", narrow=narrow) < TOLERANCE


def test_max_pool_counts_ties_once() -> None:
    """A flat region after a ReLU, as white backgrounds make it: the first pixel of each window gets it all."""
    nodes = Nodes((1, 6, 6))
    nodes.add("MaxPool", kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    nodes.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    x = np.ones((2, 1, 6, 6), np.float32)
    assert worst_error(nodes.model(), x) < TOLERANCE


@pytest.mark.parametrize(
    "body",
    [
        "r = Relu(x) y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r)",
        "r = Relu(x) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) "
        "q = AveragePool<kernel_shape=[2,2], strides=[2,2]>(r) y = Add(p, q)",
        "r = Relu(x) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) y = Neg(p)",
    ],
)
def test_max_pool_after_relu(body: str) -> None:
    """The mask of the Relu is applied to the smaller map, once, and only if nobody else reads the larger."""
    assert worst_error(model_of(body, (3, 8, 8)), random(2, 3, 8, 8)) < TOLERANCE


@pytest.mark.parametrize("factor", [2, 3])
def test_whole_factors_need_no_matrix(factor: int) -> None:
    """Nearest upsampling by a whole factor sums blocks: no constant as large as the map enters the file."""
    nodes = Nodes((3, 8, 8))
    scales = np.asarray([1, 1, factor, factor], np.float32)
    nodes.add(
        "Resize", None, scales,
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    derivative = gradient_model(measure(nodes.model(), "x", nodes.x), "x", "y0")
    assert max(np.prod(tensor.dims) for tensor in derivative.graph.initializer) < 16
