"""Every operator in the form its own opset gives it, 11 to 22: converted, run, and differentiated.

The graphs of `test_rules` are written for opset 18; `aged` gives them the form an older file has. ONNX Runtime
runs the aged file as it is, so a wrong form does not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import ModelProto, defs, helper, numpy_helper

from export.graph import UnsupportedOperator, coverage
from export.graph.network import measure, session
from export.graph.opset import to_opset18
from tests.export.graph.differentiate import (
    TOLERANCE,
    gradient_model,
    model_of,
    random,
    worst_error,
)
from tests.export.graph.test_rules import ACTIVATIONS, MAP, SHAPES, f32, ints

OPSETS = range(11, 23)
W = random
SIX = (4, 6, 8)

# Operators whose tests in `test_rules` and `test_geometries` are of another form: (body, x, weights)
MORE: dict[str, tuple[str, tuple[int, ...], dict[str, np.ndarray]]] = {
    "Conv": ("y = Conv<pads=[1,0,1,2], strides=[2,1], group=2>(x, w, b)", SIX, {"w": W(6, 2, 3, 3), "b": W(6)}),
    "Conv 1-D": ("y = Conv<pads=[2,0], dilations=[2], strides=[3]>(x, w)", (4, 17), {"w": W(5, 4, 3)}),
    "ConvTranspose": (
        "y = ConvTranspose<pads=[1,1,0,0], strides=[2,2], output_padding=[1,0]>(x, w, b)", SIX,
        {"w": W(4, 3, 3, 3), "b": W(3)},
    ),
    "ConvTranspose 1-D": ("y = ConvTranspose<strides=[2], dilations=[2]>(x, w)", (4, 7), {"w": W(4, 3, 3)}),
    "MaxPool": ("y = MaxPool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,0], ceil_mode=1>(x)", SIX, {}),
    "MaxPool dilated": ("y = MaxPool<kernel_shape=[3,2], dilations=[2,1]>(x)", SIX, {}),
    "AveragePool": ("y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)", SIX, {}),
    "AveragePool counts its padding": (
        "y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1>(x)", SIX, {},
    ),
    "AveragePool ceil": ("y = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x)", (4, 6, 9), {}),
    "Resize nearest": (
        'y = Resize<coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, r, s)', SIX,
        {"r": f32(), "s": f32(1, 1, 2, 3)},
    ),
    "Resize linear": (
        'y = Resize<mode="linear", coordinate_transformation_mode="align_corners">(x, r, s)', SIX,
        {"r": f32(), "s": f32(1, 1, 2, 1.5)},
    ),
    "Resize to sizes": (
        "n = Shape(x) f = Slice(n, zero, two, zero) z = Concat<axis=0>(f, t) "
        'y = Resize<mode="linear", coordinate_transformation_mode="pytorch_half_pixel">(x, r, s, z)', SIX,
        {"r": f32(), "s": f32(), "t": ints(9, 5), "zero": ints(0), "two": ints(2)},
    ),
    "Where": ("c = Greater(x, z) e = Exp(x) y = Where(c, e, x)", MAP, {"z": np.float32(0.1)}),
    "Resize half-pixel nearest": (
        'y = Resize<mode="nearest", coordinate_transformation_mode="tf_half_pixel_for_nn", '
        'nearest_mode="floor">(x, r, s)', SIX, {"r": f32(), "s": f32(1, 1, 2, 2)},
    ),
    "Split": ("a, b = Split<axis=1>(x, s) e = Exp(a) y = Concat<axis=1>(b, e)", MAP, {"s": ints(1, 3)}),
    "Split in outputs": ("a, b = Split<axis=2>(x) e = Exp(a) y = Concat<axis=1>(b, e)", MAP, {}),
    "Split num_outputs": (
        "a, b, c = Split<axis=3, num_outputs=3>(x) e = Exp(c) y = Concat<axis=3>(b, e, a)", MAP, {},
    ),
    "Softmax in the middle": ("y = Softmax<axis=2>(x)", MAP, {}),
    "Gelu": ("y = Gelu(x)", MAP, {}),
    "Gelu tanh": ('y = Gelu<approximate="tanh">(x)', MAP, {}),
    "ScatterND": (
        "t = Transpose<perm=[1,0,2]>(x) p = Slice(t, s, e) q = Exp(p) r = ScatterND(t, i, q) "
        "y = Transpose<perm=[1,0,2]>(r)", (5, 6), {"i": np.asarray([[1], [4]]), "s": ints(0), "e": ints(2)},
    ),
    "shape arithmetic": (
        "s = Shape(x) n = Gather<axis=0>(s, zero) m = Unsqueeze(n, first) t = Concat<axis=0>(m, minus) "
        "y = Reshape(x, t)", MAP, {"zero": np.int64(0), "first": ints(0), "minus": ints(-1)},
    ),
    "Constant": ("c = Constant<value_floats=[1.0, 2.0, 3.0, 0.5, 0.1, 4.0]>() y = Mul(x, c)", (5, 6), {}),
    "ConstantOfShape": (
        "s = Shape(x) c = ConstantOfShape<value = float[1] {2.0}>(s) y = Mul(x, c)", MAP, {},
    ),
}  # fmt: skip


@cache
def graphs() -> dict[str, tuple[ModelProto, tuple[int, ...]]]:
    """Every test graph of opset 18, or of 20 where 18 has no such operator."""
    made = {name: (model_of(body, MAP), MAP) for name, body in ACTIVATIONS.items()}
    made |= {
        name: (model_of(*case), case[1])
        for name, case in SHAPES.items()
        if name != "GroupNormalization"
    }
    return made | {name: (model_of(*case), case[1]) for name, case in MORE.items()}


def aged(model: ModelProto, opset: int) -> ModelProto | None:
    """The model as a file of `opset`; None if that opset cannot say it."""
    old = ModelProto()
    old.CopyFrom(model)
    old.opset_import[0].version = opset
    stored = {tensor.name: tensor for tensor in old.graph.initializer}
    for node in old.graph.node:
        reduction = node.op_type.startswith("Reduce")
        first = 18 if reduction and node.op_type != "ReduceSum" else 13
        moves = reduction or node.op_type in {"Squeeze", "Unsqueeze", "Split"}
        if moves and opset < first and len(node.input) > 1:
            numbers = numpy_helper.to_array(stored[node.input[1]]).tolist()
            name = "split" if node.op_type == "Split" else "axes"
            node.attribute.append(helper.make_attribute(name, numbers))
            del node.input[1:]
        if (
            node.op_type == "Split"
            and len(node.input) == 1
            and not node.attribute[1:]
            and opset >= 18
        ):
            return None  # opset 18 wants num_outputs
        try:
            schema = defs.get_schema(node.op_type, opset)
        except defs.SchemaError:
            return None
        known = all(attribute.name in schema.attributes for attribute in node.attribute)
        if not known or len(node.input) > schema.max_input:
            return None
    used = {name for node in old.graph.node for name in node.input}
    kept = [tensor for tensor in old.graph.initializer if tensor.name in used]
    del old.graph.initializer[:]
    old.graph.initializer.extend(kept)
    return old


CASES = [
    (name, opset)
    for name, (model, _) in graphs().items()
    for opset in OPSETS
    if aged(model, opset) is not None
]


@pytest.mark.parametrize(("name", "opset"), CASES)
def test_forms(name: str, opset: int) -> None:
    model, x = graphs()[name]
    old = aged(model, opset)
    assert old is not None
    _judge(old, random(3, *x))


def _judge(old: ModelProto, x: np.ndarray) -> None:
    converted = to_opset18(old)
    assert [entry.version for entry in converted.opset_import if not entry.domain] == [18]
    onnx.checker.check_model(converted)
    (before,) = session(old).run(["y"], {"x": x})
    (after,) = session(converted).run(["y"], {"x": x})
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    assert worst_error(old, x) < TOLERANCE


def test_every_operator_is_tried_at_every_opset_that_has_it() -> None:
    tried = {
        (node.op_type, opset) for name, opset in CASES for node in graphs()[name][0].graph.node
    }
    for operator in coverage():
        if operator in {"GroupNormalization", "Upsample"}:
            continue  # below: they changed meaning
        since = defs.get_schema(operator, max(OPSETS)).since_version
        first = (
            min(v for v in range(1, max(OPSETS) + 1) if defs.has(operator, v)) if since else since
        )
        missing = [v for v in OPSETS if v >= first and (operator, v) not in tried]
        assert not missing, f"{operator} is not tried at opsets {missing}"


def _exists(operator: str, opset: int) -> bool:
    try:
        return bool(defs.get_schema(operator, opset))
    except defs.SchemaError:
        return False


@pytest.mark.parametrize("opset", [18, 19, 20])
def test_group_normalization_with_a_scale_per_group(opset: int) -> None:
    body = "y = GroupNormalization<num_groups=2, epsilon=0.01>(x, s, b)"
    _judge(model_of(body, MAP, {"s": W(2), "b": W(2, seed=1)}, opset), random(3, *MAP))


@pytest.mark.parametrize("opset", [21, 22])
def test_group_normalization_with_a_scale_per_channel(opset: int) -> None:
    body = "y = GroupNormalization<num_groups=2, epsilon=0.01>(x, s, b)"
    _judge(model_of(body, MAP, {"s": W(4), "b": W(4, seed=1)}, opset), random(3, *MAP))


OLD: dict[str, tuple[int, str, Mapping[str, np.ndarray]]] = {
    "Upsample 7": (7, 'y = Upsample<mode="nearest", scales=[1.0, 1.0, 2.0, 2.0]>(x)', {}),
    "Upsample 9": (9, 'y = Upsample<mode="nearest">(x, s)', {"s": f32(1, 1, 2, 3)}),
    "Upsample 9 linear": (9, 'y = Upsample<mode="linear">(x, s)', {"s": f32(1, 1, 2, 2)}),
    "Resize 10": (10, 'y = Resize<mode="nearest">(x, s)', {"s": f32(1, 1, 2, 2)}),
    "Resize 10 linear": (10, 'y = Resize<mode="linear">(x, s)', {"s": f32(1, 1, 2, 3)}),
    "Clip 6": (9, "y = Clip<min=-0.5, max=0.5>(x)", {}),
    "Pad 2": (9, 'y = Pad<mode="reflect", pads=[0,0,1,1,0,0,2,0]>(x)', {}),
    "Slice 1": (9, "y = Slice<axes=[2], starts=[1], ends=[5]>(x)", {}),
    "Slice 10": (10, "y = Slice(x, s, e, a)", {"s": ints(1), "e": ints(5), "a": ints(2)}),
    "Dropout 7": (9, "y = Dropout<ratio=0.4>(x)", {}),
    "BatchNormalization 7": (
        7, "y = BatchNormalization(x, s, b, m, v)",
        {"s": W(4), "b": W(4, seed=1), "m": W(4, seed=2), "v": W(4, low=0.5)},
    ),
    "Softmax 1": (8, "g = GlobalAveragePool(x) y = Softmax(g)", {}),
    "Reshape 5": (7, "y = Reshape(x, s)", {"s": ints(0, -1)}),
    "AveragePool 7": (7, "y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x)", {}),
    "MaxPool 8": (8, "y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)", {}),
    "Sum 8": (8, "e = Exp(x) y = Sum(e, x)", {}),
    "Gemm 7": (7, "g = GlobalAveragePool(x) f = Flatten(g) y = Gemm(f, w, b)", {"w": W(4, 5), "b": W(5)}),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_files_older_than_opset_11(name: str) -> None:
    opset, body, weights = OLD[name]
    _judge(model_of(body, MAP, weights, opset), random(3, *MAP))


@pytest.mark.parametrize("opset", [19, 20, 21, 22])
def test_wrapping_pads_are_said_in_slices(opset: int) -> None:
    body = 'y = Pad<mode="wrap">(x, p)'
    _judge(model_of(body, MAP, {"p": ints(0, 0, 2, 3, 0, 0, 1, 4)}, opset), random(3, *MAP))
    body = 'y = Pad<mode="wrap">(x, p, , a)'
    weights = {"p": ints(1, 2), "a": ints(-1)}
    _judge(model_of(body, MAP, weights, opset), random(3, *MAP))


@pytest.mark.parametrize(
    ("body", "opset", "word"),
    [
        ("y = AveragePool<kernel_shape=[2,2], dilations=[2,2]>(x)", 19, "dilations"),
        ('y = Resize<antialias=1, mode="linear">(x, , s)', 18, "antialias"),
        ('y = Resize<keep_aspect_ratio_policy="not_larger", axes=[2,3]>(x, , , z)', 18, "aspect"),
        ('y = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, roi, s)', 13, "tf_crop"),
    ],
)  # fmt: skip
def test_what_has_no_rule_is_refused_by_name(body: str, opset: int, word: str) -> None:
    weights = {
        "s": f32(1, 1, 0.5, 0.5),
        "z": ints(12, 12),
        "roi": f32(0, 0, 0, 0, 1, 1, 1, 1),
    }
    used = {
        name: array for name, array in weights.items() if f"{name}," in body or f"{name})" in body
    }
    model = model_of(body, MAP, used, opset)
    with pytest.raises(UnsupportedOperator, match=word):
        gradient_model(measure(to_opset18(model), "x", MAP), "x", "y")
