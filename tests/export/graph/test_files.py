"""Kinds of file owners bring, in small: each is inspected, becomes a teacher, and is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from export.checks.parity import check_batches, check_derivative
from export.graph import InputSpec, UnsupportedNetwork, UnsupportedOperator, build_teacher_graph
from export.inspect import inspect, load
from tests.export.graph.differentiate import random

SIDE = 16
STEM = """
    c = Conv<pads=[1,1,1,1], strides=[2,2]>({image}, w)
    r = Relu(c)
    d = Conv<pads=[1,1,1,1]>(r, v)
    map = Relu(d)
"""
HEAD = "g = GlobalAveragePool(map) f = Flatten(g) logits = Gemm<transB=1>(f, u)"
WEIGHTS = {
    "w": random(6, 3, 3, 3),
    "v": random(8, 6, 3, 3),
    "u": random(5, 8),
    "k": random(4, 8, 1, 1),
}


def text(
    body: str,
    image: str = "float[N, 3, 16, 16] x",
    outputs: str = "float[N, 5] logits",
    more: str = "",
    opset: str = '"" : 17',
) -> ModelProto:
    model = parser.parse_model(
        f"<ir_version: 8, opset_import: [{opset}]> net ({image}) => ({outputs}) {{ {body} }} {more}"
    )
    for name, array in WEIGHTS.items():
        if f"{name})" in body:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def halved() -> ModelProto:
    model = text(STEM.format(image="x") + HEAD, "float16[N, 3, 16, 16] x", "float16[N, 5] logits")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    return model


def listed_as_inputs() -> ModelProto:
    model = text(STEM.format(image="x") + HEAD)
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims)
        )
    return model


PLAIN = STEM.format(image="x") + HEAD
FILES: dict[str, ModelProto] = {
    "plain": text(PLAIN),
    "uint8": text("q = Cast<to=1>(x)" + STEM.format(image="q") + HEAD, "uint8[N, 3, 16, 16] x"),
    "uint8 NHWC, as TensorFlow": text(
        "q = Cast<to=1>(x) t = Transpose<perm=[0,3,1,2]>(q)" + STEM.format(image="t") + HEAD,
        "uint8[N, 16, 16, 3] x",
    ),
    "NHWC": text(
        "t = Transpose<perm=[0,3,1,2]>(x)" + STEM.format(image="t") + HEAD, "float[N, 16, 16, 3] x"
    ),
    "grey": text(
        "t = Concat<axis=1>(x, x, x)" + STEM.format(image="t") + HEAD, "float[N, 1, 16, 16] x"
    ),
    "preprocessing inside": text(
        "m = Constant<value_float=0.5>() a = Sub(x, m) b = Div(a, m)" + STEM.format(image="b") + HEAD
    ),
    "initialisers listed as inputs": listed_as_inputs(),
    "a batch of one": text(
        STEM.format(image="x") + "s = Constant<value_ints=[1, -1]>() g = GlobalAveragePool(map) "
        "f = Reshape(g, s) logits = Gemm<transB=1>(f, u)",
        "float[1, 3, 16, 16] x", "float[1, 5] logits",
    ),
    "softmax": text(PLAIN + " p = Softmax<axis=1>(logits)", outputs="float[N, 5] p"),
    "the class itself": text(PLAIN + " p = ArgMax<axis=1, keepdims=0>(logits)", outputs="int64[N] p"),
    "an embedding beside the logits": text(
        PLAIN + " e = Transpose<perm=[0,2,3,1]>(g)", outputs="float[N, 1, 1, 8] e, float[N, 5] logits"
    ),
    "a local function": text(
        "c = Conv<pads=[1,1,1,1]>(x, w) r = own.swish(c) d = Conv(r, v) map = own.swish(d)" + HEAD,
        more='<domain: "own", opset_import: ["" : 17]> swish (x) => (y) { s = Sigmoid(x) y = Mul(x, s) }',
        opset='"" : 17, "own" : 1',
    ),
    "segmentation": text(
        STEM.format(image="x") + "logits = Conv(map, k)", outputs="float[N, 4, 8, 8] logits"
    ),
    "a detector that suppresses": text(
        STEM.format(image="x") + """
        raw = Conv(map, k) s = Constant<value_ints=[0, 4, -1]>() scores = Reshape(raw, s) prob = Sigmoid(scores)
        b = ReduceMean<axes=[1], keepdims=1>(map) z = Constant<value_ints=[0, -1, 1]>() one = Reshape(b, z)
        boxes = Concat<axis=2>(one, one, one, one)
        kept = NonMaxSuppression(boxes, prob)
        """,
        outputs="int64[M, 3] kept",
    ),
    "boxes beside scores": text(
        STEM.format(image="x") + """
        raw = Conv(map, k) s = Constant<value_ints=[0, 4, -1]>() scores = Reshape(raw, s) prob = Sigmoid(scores)
        both = Concat<axis=1>(scores, prob) out = Transpose<perm=[0,2,1]>(both)
        """,
        outputs="float[N, 64, 8] out",
    ),
    "a sequence": text(
        STEM.format(image="x") + """
        parts = SplitToSequence<axis=1>(map, h) zero = Constant<value_int=0>() a = SequenceAt(parts, zero)
        g = GlobalAveragePool(map) f = Flatten(g) logits = Gemm<transB=1>(f, u)
        """.replace("(map, h)", "(map)"),
        outputs="float[N, 5] logits, float a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_becomes_a_teacher(name: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(FILES[name], path)
    found = inspect(path)
    assert found.problem is None
    assert found.logits is not None
    assert found.suggested_tap is not None
    model, spec = load(path), found.assumed
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    teacher = build_teacher_graph(
        model, spec, taps={"last": found.suggested_tap}, logits=found.logits
    )
    onnx.checker.check_model(teacher, full_check=True)
    batches = check_batches(teacher, images)
    assert batches.maps_vary
    assert batches.worst_difference < 1e-4
    report = check_derivative(model, spec, images, logits=found.logits, wrt=found.suggested_tap)
    assert report.judge == "float64 autograd"
    assert report.passed, report


def test_what_inspect_says_of_them(tmp_path: Path) -> None:
    said = {}
    for name, model in FILES.items():
        onnx.save(model, tmp_path / "net.onnx")
        said[name] = inspect(tmp_path / "net.onnx")
    assert said["uint8"].assumed.scale == 1
    assert said["NHWC"].assumed.layout == "NHWC"
    assert said["grey"].assumed.channels == "grey"
    for name in ("softmax", "the class itself", "an embedding beside the logits"):
        assert said[name].logits == "logits"
    assert said["a detector that suppresses"].logits == "scores"
    assert said["boxes beside scores"].logits == "scores"
    assert said["plain"].suggested_tap == "map"
    assert said["plain"].parameters == sum(WEIGHTS[name].size for name in "wvu")


def test_weights_in_a_file_beside(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(
        FILES["plain"], path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    assert inspect(path).problem is None
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UnsupportedNetwork, match=r"weight file|weights\.bin"):
        inspect(path)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (text(PLAIN, "float[N, 3, 16, 16] x, float[N, 3] y"), "2 inputs"),
        (text("logits = Gemm<transB=1>(x, u)", "float[N, 8] x"), "rank 2"),
        (text(PLAIN, "int64[N, 3, 16, 16] x"), "INT64|int64"),
        (
            text(
                "q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z)"
                + STEM.format(image="y") + HEAD
            ),
            "quantised on the fly",
        ),
    ],
)  # fmt: skip
def test_refused_with_a_sentence(model: ModelProto, words: str, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(UnsupportedNetwork, match=words) as refusal:
        inspect(tmp_path / "net.onnx")
    assert "\n" not in str(refusal.value)


def test_a_quantised_network_is_named_so() -> None:
    body = PLAIN.replace(
        "g = Global",
        "s = Constant<value_float=0.1>() q = QuantizeLinear(map, s) m2 = DequantizeLinear(q, s) g = Global",
    ).replace("Pool(map)", "Pool(m2)")
    spec = InputSpec(size=(SIDE, SIDE))
    with pytest.raises(UnsupportedOperator, match="quantised"):
        build_teacher_graph(text(body), spec, taps={"last": "map"})
    build_teacher_graph(text(body), spec, taps={"last": "map"}, kind="eigencam")


def test_a_branch_is_passed_by_or_refused_by_name() -> None:
    """An If after the logits does no harm; one between the image and the logits has no rule."""
    tail = (
        "n = Shape(x) zero = Constant<value_ints=[0]>() k = Gather<axis=0>(n, zero) many = Greater(k, zero) "
        "m = Squeeze(many) out = If(m) <then_branch = a () => (float[N, 5] p) { p = Softmax<axis=1>(logits) }, "
        "else_branch = b () => (float[N, 5] q) { q = Identity(logits) }>"
    )
    model = text(PLAIN + tail, outputs="float[N, 5] out")
    spec = InputSpec(size=(SIDE, SIDE))
    with pytest.raises(UnsupportedOperator, match="If"):
        build_teacher_graph(model, spec, taps={"last": "map"}, logits="out")
    build_teacher_graph(model, spec, taps={"last": "map"}, logits="logits")
