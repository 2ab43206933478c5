"""Random convolution, pooling and resizing geometries against float64 autograd: 560 of them.

One model is built per draw, so that the examples stay cheap: each is a single operator on a few hundred numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.graph import UnsupportedNetwork
from tests.export.graph.differentiate import TOLERANCE, random, worst_error

QUICK = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def single(
    op: str, x: tuple[int, ...], inputs: dict[str, np.ndarray | None], **attributes: object
) -> ModelProto:
    names = ["x", *(name if array is not None else "" for name, array in inputs.items())]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], **attributes)],
        "single",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *x])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(array, name)
            for name, array in inputs.items()
            if array is not None
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def judge(model: ModelProto, x: tuple[int, ...], narrow: tuple[int, ...] = ()) -> None:
    try:
        error = worst_error(model, random(2, *x), narrow=narrow)
    except UnsupportedNetwork as refusal:
        if "ONNX Runtime cannot run" not in str(refusal):
            raise
        assume(False)  # not a geometry that exists
    assert error < TOLERANCE


@st.composite
def window(draw: st.DrawFn, rank: int) -> dict[str, list[int]]:
    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    return {
        "kernel_shape": each(1, 4),
        "strides": each(1, 4),
        "dilations": each(1, 2),
        "pads": [*each(0, 2), *each(0, 2)],
    }


def sizes(draw: st.DrawFn, rank: int) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(5, 12), min_size=rank, max_size=rank)))


@settings(QUICK, max_examples=150)
@given(st.data())
def test_conv(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    attributes = data.draw(window(rank))
    group = data.draw(st.sampled_from([1, 1, 2, 4]))
    each = data.draw(st.integers(1, 2))
    spatial = sizes(data.draw, rank)
    if data.draw(st.sampled_from([False, False, False, True])):
        del attributes["pads"]
        if max(attributes["dilations"]) == 1:
            attributes["auto_pad"] = data.draw(
                st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"])
            )
    w = random(group * each, 4 // group, *attributes["kernel_shape"])
    judge(single("Conv", (4, *spatial), {"w": w}, group=group, **attributes), (4, *spatial))


@settings(QUICK, max_examples=110)
@given(st.data())
def test_conv_transpose(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    attributes = data.draw(window(rank))
    group = data.draw(st.sampled_from([1, 2, 4]))
    spatial = tuple(n // 2 for n in sizes(data.draw, rank))
    attributes["output_padding"] = [data.draw(st.integers(0, s - 1)) for s in attributes["strides"]]
    reach = [
        (k - 1) * d + 1
        for k, d in zip(attributes["kernel_shape"], attributes["dilations"], strict=True)
    ]
    match data.draw(st.integers(0, 5)):
        case 0:
            del attributes["pads"]
            attributes["auto_pad"] = data.draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER"]))
            assume(all(r >= s for r, s in zip(reach, attributes["strides"], strict=True)))
            attributes["output_padding"] = [0] * rank
        case 1:
            del attributes["pads"], attributes["output_padding"]
            attributes["output_shape"] = [
                (n - 1) * s + r - data.draw(st.integers(0, 1))
                for n, s, r in zip(spatial, attributes["strides"], reach, strict=True)
            ]
    w = random(4, 2, *attributes["kernel_shape"])
    judge(
        single("ConvTranspose", (4, *spatial), {"w": w}, group=group, **attributes), (4, *spatial)
    )


@settings(QUICK, max_examples=120)
@given(st.data())
def test_max_pool(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    attributes = data.draw(window(rank))
    assume(
        all(p < k for p, k in zip(attributes["pads"], attributes["kernel_shape"] * 2, strict=True))
    )
    spatial = sizes(data.draw, rank)
    attributes["ceil_mode"] = data.draw(st.integers(0, 1))
    narrow = data.draw(st.sampled_from([(), (2,), tuple(range(2, 2 + rank))]))
    judge(single("MaxPool", (3, *spatial), {}, **attributes), (3, *spatial), narrow)


@settings(QUICK, max_examples=100)
@given(st.data())
def test_average_pool(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    attributes = data.draw(window(rank))
    del attributes["dilations"]
    assume(
        all(p < k for p, k in zip(attributes["pads"], attributes["kernel_shape"] * 2, strict=True))
    )
    spatial = sizes(data.draw, rank)
    attributes["ceil_mode"] = data.draw(st.integers(0, 1))
    attributes["count_include_pad"] = data.draw(st.integers(0, 1))
    narrow = data.draw(st.sampled_from([(), (2,), tuple(range(2, 2 + rank))]))
    judge(single("AveragePool", (3, *spatial), {}, **attributes), (3, *spatial), narrow)


@settings(QUICK, max_examples=130)
@given(st.data())
def test_resize(data: st.DataObject) -> None:
    spatial = sizes(data.draw, 2)
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    transform = data.draw(
        st.sampled_from(
            [
                "half_pixel",
                "pytorch_half_pixel",
                "align_corners",
                "asymmetric",
                "half_pixel_symmetric",
            ]
        )
    )
    attributes: dict[str, object] = {"mode": mode, "coordinate_transformation_mode": transform}
    if mode == "nearest":
        rounding = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
        attributes["nearest_mode"] = data.draw(st.sampled_from(rounding))
    inputs: dict[str, np.ndarray | None] = {"roi": None}
    if data.draw(st.booleans()):
        scale = st.sampled_from([0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 2.3])
        inputs["scales"] = np.asarray([1, 1, data.draw(scale), data.draw(scale)], np.float32)
    else:
        out = st.integers(1, 20)
        inputs |= {
            "scales": None,
            "sizes": np.asarray([3, data.draw(out), data.draw(out)], np.int64),
        }
        attributes["axes"] = [1, 2, 3]
    narrow = data.draw(st.sampled_from([(), (), (2,), (2, 3)]))
    judge(single("Resize", (3, *spatial), inputs, **attributes), (3, *spatial), narrow)


@pytest.mark.parametrize("factor", [2, 3])
def test_whole_factors_need_no_matrix(factor: int) -> None:
    """Nearest upsampling by a whole factor sums blocks: no constant as large as the map enters the file."""
    from export.graph.network import measure
    from tests.export.graph.differentiate import gradient_model

    scales = np.asarray([1, 1, factor, factor], np.float32)
    model = single(
        "Resize", (3, 8, 8), {"roi": None, "scales": scales},
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    derivative = gradient_model(measure(model, "x", (3, 8, 8)), "x", "y")
    assert max(np.prod(tensor.dims) for tensor in derivative.graph.initializer) < 16
