"""Every derivative rule against float64 autograd, on small graphs in ONNX text."""

from __future__ import annotations

import numpy as np
import pytest

from export.graph import UnsupportedOperator, coverage
from export.graph.network import measure
from tests.export.graph.differentiate import (
    TOLERANCE,
    gradient_model,
    model_of,
    random,
    worst_error,
)

MAP = (4, 6, 8)  # C, H, W


def ints(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, np.int64)


def f32(*numbers: float) -> np.ndarray:
    return np.asarray(numbers, np.float32)


# name: (body, x without batch, weights)
ACTIVATIONS = {
    "Relu": "y = Relu(x)",
    "ThresholdedRelu": "y = ThresholdedRelu<alpha=0.3>(x)",
    "Clip both": "low = Constant<value_float=-0.5>() high = Constant<value_float=0.8>() y = Clip(x, low, high)",
    "Clip low": "low = Constant<value_float=-0.5>() y = Clip(x, low)",
    "Clip high": "high = Constant<value_float=0.5>() y = Clip(x, , high)",
    "Clip none": "y = Clip(x)",
    "LeakyRelu": "y = LeakyRelu<alpha=0.2>(x)",
    "Elu": "y = Elu<alpha=0.7>(x)",
    "Selu": "y = Selu(x)",
    "Celu": "y = Celu<alpha=0.6>(x)",
    "HardSigmoid": "y = HardSigmoid<alpha=0.3, beta=0.4>(x)",
    "HardSwish": "t = Add(x, x) s = Add(t, t) y = HardSwish(s)",
    "Mish": "y = Mish(x)",
    "Sigmoid": "y = Sigmoid(x)",
    "Tanh": "y = Tanh(x)",
    "Erf": "y = Erf(x)",
    "Softplus": "y = Softplus(x)",
    "Softsign": "y = Softsign(x)",
    "Softmax last": "y = Softmax(x)",
    "Softmax channels": "y = Softmax<axis=1>(x)",
    "LogSoftmax": "y = LogSoftmax<axis=1>(x)",
    "Neg": "y = Neg(x)",
    "Abs": "y = Abs(x)",
    "Exp": "y = Exp(x)",
    "Sin": "y = Sin(x)",
    "Cos": "y = Cos(x)",
    "square": "y = Mul(x, x)",
    "Pow 2": "two = Constant<value_float=2.0>() y = Pow(x, two)",
    "Pow 3": "three = Constant<value_float=3.0>() y = Pow(x, three)",
    "Pow 1": "one = Constant<value_float=1.0>() y = Pow(x, one)",
    "Pow integer exponent": "two = Constant<value_int=2>() y = Pow(x, two)",
    "Sqrt": "p = Exp(x) y = Sqrt(p)",
    "Reciprocal": "p = Exp(x) y = Reciprocal(p)",
    "Log": "p = Exp(x) q = Add(p, p) y = Log(q)",
    "Pow of both": "p = Exp(x) q = Sigmoid(x) y = Pow(p, q)",
    "Identity": "y = Identity(x)",
    "Dropout": "y = Dropout(x)",
    "Cast to half and back": "h = Cast<to=11>(x) y = Cast<to=1>(h)",
    "CastLike": "y = CastLike(x, x)",
    "Floor": "f = Floor(x) y = Mul(f, x)",
    "Round, Ceil, Sign": "a = Round(x) b = Ceil(x) c = Sign(x) d = Sum(a, b, c) y = Mul(d, x)",
    "quantised and back": "i = Cast<to=6>(x) f = Cast<to=1>(i) y = Mul(f, x)",
    "Sum of three": "a = Exp(x) b = Sin(x) y = Sum(a, b, x)",
    "Mean of three": "a = Exp(x) b = Sin(x) y = Mean(a, b, x)",
    "Max of two": "a = Exp(x) b = Neg(x) y = Max(a, b)",
    "Max with itself": "a = Relu(x) b = Relu(a) y = Max(a, b)",
    "Min of three": "a = Exp(x) b = Neg(x) y = Min(a, b, x)",
    "Max of one": "y = Max(x)",
    "Where": "z = Constant<value_float=0.1>() c = Greater(x, z) e = Exp(x) y = Where(c, e, x)",
    "Where scalar": "z = Constant<value_float=0.1>() c = Less(x, z) y = Where(c, z, x)",
    "Div both": "p = Exp(x) s = Sin(x) y = Div(s, p)",
    "Sub both": "p = Exp(x) y = Sub(x, p)",
    "read three times": "a = Exp(x) b = Mul(a, x) y = Add(b, a)",
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_elementwise(name: str) -> None:
    assert worst_error(model_of(ACTIVATIONS[name], MAP), random(3, *MAP)) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["Relu", "Sigmoid", "Softmax channels", "LogSoftmax", "Div both", "Max of two"]
)
def test_elementwise_under_a_narrow_gradient(name: str) -> None:
    """A gradient that is the same at every pixel gives what the full one gives."""
    model = model_of(ACTIVATIONS[name], MAP)
    assert worst_error(model, random(3, *MAP), narrow=(2, 3)) < TOLERANCE
    assert worst_error(model, random(3, *MAP), narrow=(1,)) < TOLERANCE
    assert worst_error(model, random(3, *MAP), narrow=(0, 1, 2, 3)) < TOLERANCE


W = random
SHAPES = {
    # broadcasting
    "Add bias": ("y = Add(x, w)", MAP, {"w": W(4, 1, 1)}),
    "Mul scale": ("y = Mul(w, x)", MAP, {"w": W(4, 1, 1)}),
    "Mul gate": ("g = GlobalAveragePool(x) s = Sigmoid(g) y = Mul(x, s)", MAP, {}),
    "Sub mean": ("m = ReduceMean<keepdims=1>(x, a) y = Sub(x, m)", MAP, {"a": ints(1, 2)}),
    "x grows": ("y = Mul(x, w)", (1, 6, 1), {"w": W(5, 4, 1, 8)[:1]}),
    "x grows in rank": ("y = Add(x, w)", (3,), {"w": W(2, 1, 3)}),
    "Div by norm": ("n = ReduceL2(x, a) y = Div(x, n)", MAP, {"a": ints(1)}),
    "PRelu": ("y = PRelu(x, w)", MAP, {"w": W(4, 1, 1)}),
    "PRelu both": ("s = Tanh(x) y = PRelu(x, s)", MAP, {}),
    "Clip tensor": ("y = Clip(x, l, h)", MAP, {"l": np.float32(-1), "h": np.float32(0.4)}),
    # matrix products
    "MatMul weight": ("y = MatMul(x, w)", (5, 6), {"w": W(6, 7)}),
    "MatMul left weight": ("y = MatMul(w, x)", (5, 6), {"w": W(7, 5)}),
    "MatMul vector": ("y = MatMul(x, w)", (5, 6), {"w": W(6)}),
    "MatMul row": ("y = MatMul(w, x)", (5, 6), {"w": W(5)}),
    "MatMul rank 2": ("y = MatMul(x, w)", (6,), {"w": W(6, 7)}),
    "attention": (
        "t = Transpose<perm=[0,2,1]>(x) s = MatMul(x, t) p = Softmax(s) y = MatMul(p, x)", (5, 6), {},
    ),
    "MatMul broadcast batch": ("y = MatMul(x, w)", (2, 5, 6), {"w": W(3, 2, 6, 4)[:1]}),
    "MatMul broadcast x": ("y = MatMul(x, w)", (1, 5, 6), {"w": W(1, 3, 6, 4)}),
    "Gemm": ("y = Gemm(x, w, b)", (6,), {"w": W(6, 5), "b": W(5)}),
    "Gemm transB": ("y = Gemm<transB=1, alpha=0.5>(x, w)", (6,), {"w": W(5, 6)}),
    "Gemm of x and x": ("t = MatMul(x, w) y = Gemm<beta=0.3>(t, v, t)", (6,), {"w": W(6, 5), "v": W(5, 5)}),
    "Gemm bias": ("t = MatMul(x, v) y = Gemm<beta=2.0>(t, w, x)", (5,), {"v": W(5, 6), "w": W(6, 5)}),
    "Einsum weight": ('y = Einsum<equation="nij,jk->nik">(x, w)', (5, 6), {"w": W(6, 7)}),
    "Einsum attention": ('y = Einsum<equation="nqd,nkd->nqk">(x, x)', (5, 6), {}),
    "Einsum transpose": ('y = Einsum<equation="nij->nji">(x)', (5, 6), {}),
    "Einsum sum": ('y = Einsum<equation="nij,k->nk">(x, w)', (5, 6), {"w": W(3)}),
    # normalisations
    "BatchNormalization": (
        "y = BatchNormalization(x, s, b, m, v)", MAP,
        {"s": W(4), "b": W(4, seed=1), "m": W(4, seed=2), "v": W(4, low=0.5)},
    ),
    "BatchNormalization rank 2": (
        "y = BatchNormalization<epsilon=0.01>(x, s, b, m, v)", (4,),
        {"s": W(4), "b": W(4, seed=1), "m": W(4, seed=2), "v": W(4, low=0.5)},
    ),
    "LayerNormalization": ("y = LayerNormalization(x, s, b)", (5, 6), {"s": W(6), "b": W(6, seed=1)}),
    "LayerNormalization two axes": ("y = LayerNormalization<axis=-2>(x, s)", (4, 5, 6), {"s": W(5, 6)}),
    "LayerNormalization affine from x": (
        "m = ReduceMean(x, a) t = Transpose<perm=[0,2,1]>(x) "
        "y = LayerNormalization(x, s) ", (5, 6), {"s": W(6), "a": ints(1)},
    ),
    "InstanceNormalization": (
        "y = InstanceNormalization(x, s, b)", MAP, {"s": W(4), "b": W(4, seed=1)},
    ),
    "GroupNormalization": (
        "y = GroupNormalization<num_groups=2>(x, s, b)", MAP, {"s": W(2), "b": W(2, seed=1)},
    ),
    "LRN odd": ("y = LRN<size=3, alpha=0.5, beta=0.6, bias=1.5>(x)", MAP, {}),
    "LRN wide": ("y = LRN<size=5, alpha=0.5>(x)", (9, 5, 3), {}),
    "LpNormalization 2": ("y = LpNormalization<axis=1, p=2>(x)", MAP, {}),
    "LpNormalization 1": ("y = LpNormalization<axis=-1, p=1>(x)", MAP, {}),
    # reductions
    "ReduceMean pixels": ("y = ReduceMean<keepdims=0>(x, a)", MAP, {"a": ints(2, 3)}),
    "ReduceMean keep": ("y = ReduceMean(x, a)", MAP, {"a": ints(-1)}),
    "ReduceSum": ("y = ReduceSum<keepdims=0>(x, a)", MAP, {"a": ints(1)}),
    "ReduceSum noop": ("y = ReduceSum<noop_with_empty_axes=1>(x)", MAP, {}),
    "ReduceMax": ("y = ReduceMax<keepdims=0>(x, a)", MAP, {"a": ints(2, 3)}),
    "ReduceMin": ("y = ReduceMin(x, a)", MAP, {"a": ints(1)}),
    "ReduceMax ties": ("r = Relu(x) y = ReduceMax(r, a)", MAP, {"a": ints(3)}),
    "ReduceL1": ("y = ReduceL1(x, a)", MAP, {"a": ints(1)}),
    "ReduceL2": ("y = ReduceL2<keepdims=0>(x, a)", MAP, {"a": ints(1)}),
    "ReduceSumSquare": ("y = ReduceSumSquare(x, a)", MAP, {"a": ints(1, 2)}),
    "ReduceLogSumExp": ("y = ReduceLogSumExp(x, a)", MAP, {"a": ints(1)}),
    "ReduceLogSum": ("p = Exp(x) y = ReduceLogSum(p, a)", MAP, {"a": ints(1)}),
    "GlobalAveragePool": ("y = GlobalAveragePool(x)", MAP, {}),
    "GlobalMaxPool": ("y = GlobalMaxPool(x)", MAP, {}),
    "GlobalMaxPool ties": ("r = Relu(x) q = Neg(r) y = GlobalMaxPool(q)", MAP, {}),
    "CumSum": ("y = CumSum(x, a)", (5, 6), {"a": np.int64(1)}),
    "CumSum reverse exclusive": ("y = CumSum<reverse=1, exclusive=1>(x, a)", (5, 6), {"a": np.int64(2)}),
    # layout
    "Flatten": ("y = Flatten(x)", MAP, {}),
    "Flatten 2": ("f = Flatten<axis=2>(x) y = Exp(f)", MAP, {}),
    "Reshape tokens": ("y = Reshape(x, s)", MAP, {"s": ints(0, 2, 2, -1)}),
    "Reshape into batch": (
        "r = Reshape(x, s) e = Exp(r) y = Reshape(e, t)", MAP,
        {"s": ints(-1, 2, 48), "t": ints(-1, 192)},
    ),
    "Squeeze": ("g = GlobalAveragePool(x) y = Squeeze(g, a)", MAP, {"a": ints(2, 3)}),
    "Unsqueeze": ("u = Unsqueeze(x, a) y = Exp(u)", MAP, {"a": ints(1, -1)}),
    "Transpose": ("y = Transpose<perm=[0,2,3,1]>(x)", MAP, {}),
    "Expand": ("y = Expand(x, s)", (4, 1, 8), {"s": ints(1, 4, 6, 8)}),
    "Expand rank": ("y = Expand(x, s)", (4,), {"s": ints(2, 1, 4)}),
    "Tile": ("y = Tile(x, s)", MAP, {"s": ints(1, 2, 1, 3)}),
    "DepthToSpace": ("y = DepthToSpace<blocksize=2>(x)", (8, 3, 5), {}),
    "DepthToSpace CRD": ('y = DepthToSpace<blocksize=2, mode="CRD">(x)', (8, 3, 5), {}),
    "SpaceToDepth": ("y = SpaceToDepth<blocksize=2>(x)", (3, 4, 6), {}),
    # selection
    "Concat": ("e = Exp(x) s = Sin(x) y = Concat<axis=1>(e, x, s)", MAP, {}),
    "Concat with constant": ("e = Exp(x) z = Mul(x, q) y = Concat<axis=-1>(e, z)", MAP, {"q": f32(0)}),
    "Slice": ("y = Slice(x, s, e, a)", MAP, {"s": ints(1, -5), "e": ints(6, -1), "a": ints(2, 3)}),
    "Slice step": ("y = Slice(x, s, e, a, t)", MAP, {"s": ints(1), "e": ints(8), "a": ints(3), "t": ints(3)}),
    "Slice backwards": (
        "y = Slice(x, s, e, a, t)", MAP,
        {"s": ints(6), "e": ints(-2**31), "a": ints(3), "t": ints(-2)},
    ),
    "Slice reverse": (
        "y = Slice(x, s, e, a, t)", MAP,
        {"s": ints(-1), "e": ints(-(2**63) + 1), "a": ints(3), "t": ints(-1)},
    ),
    "Slice to the end": ("y = Slice(x, s, e, a)", MAP, {"s": ints(1), "e": ints(2**63 - 1), "a": ints(1)}),
    "Gather one": ("y = Gather<axis=1>(x, i)", MAP, {"i": np.int64(2)}),
    "Gather some": ("y = Gather<axis=1>(x, i)", MAP, {"i": ints(3, 0, 3)}),
    "Gather neighbours": ("y = Gather<axis=2>(x, i)", MAP, {"i": ints(1, 2, 3)}),
    "Gather permutation": ("y = Gather<axis=1>(x, i)", MAP, {"i": ints(2, -4, 3, 1)}),
    "Gather table": ("y = Gather<axis=3>(x, i)", MAP, {"i": np.asarray([[0, 5], [5, 7]])}),
    "roll": ("a, b = Split<axis=2>(x, s) y = Concat<axis=2>(b, a)", MAP, {"s": ints(2, 4)}),
    # padding and resizing
    "Pad constant": ("y = Pad(x, p, c)", MAP, {"p": ints(0, 0, 1, 2, 0, 1, 0, 3), "c": np.float32(0.7)}),
    "Pad axes": ("y = Pad(x, p, , a)", MAP, {"p": ints(1, 2, 3, 0), "a": ints(2, 3)}),
    "Pad negative": ("y = Pad(x, p)", MAP, {"p": ints(0, 0, -1, 2, 0, 0, 1, -3)}),
    "Pad reflect": ('y = Pad<mode="reflect">(x, p)', MAP, {"p": ints(0, 0, 2, 3, 0, 0, 1, 4)}),
    "Pad edge": ('y = Pad<mode="edge">(x, p)', MAP, {"p": ints(0, 0, 2, 3, 0, 0, 1, 4)}),
    "CumSum then pool": ("c = CumSum(x, a) y = GlobalAveragePool(c)", MAP, {"a": np.int64(3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    body, x, weights = SHAPES[name]
    assert worst_error(model_of(body, x, weights), random(3, *x)) < TOLERANCE


NARROW = [
    "GlobalAveragePool", "Reshape tokens", "Transpose", "Concat", "Slice", "Slice step", "Gather some",
    "Pad reflect", "Pad constant", "Pad negative", "Tile", "LRN odd", "MatMul weight", "attention",
    "Einsum weight",
    "InstanceNormalization", "LayerNormalization", "BatchNormalization", "Mul gate", "Slice backwards", "roll",
    "DepthToSpace", "Gather table",
]  # fmt: skip


@pytest.mark.parametrize("name", NARROW)
def test_shapes_under_a_narrow_gradient(name: str) -> None:
    body, x, weights = SHAPES[name]
    model = model_of(body, x, weights)
    assert worst_error(model, random(3, *x), narrow=(len(x),)) < TOLERANCE
    assert worst_error(model, random(3, *x), narrow=tuple(range(1, len(x) + 1))) < TOLERANCE


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_split_parts_nobody_reads_get_zero(used: tuple[int, ...]) -> None:
    body = "p0, p1, p2 = Split<axis=1>(x, s) " + " ".join(f"e{i} = Exp(p{i})" for i in used)
    parts = ", ".join(f"e{i}" for i in used)
    model = model_of(f"{body} y = Concat<axis=1>({parts})", MAP, {"s": ints(1, 2, 1)})
    assert worst_error(model, random(3, *MAP)) < TOLERANCE


def test_every_listed_operator_is_tested() -> None:
    """The registry shows at a glance what is covered; nothing in it goes untested."""
    tested = " ".join([*ACTIVATIONS.values(), *(body for body, _, _ in SHAPES.values())])
    elsewhere = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "Resize", "Upsample", "Split"}
    elsewhere |= {"ScatterND"}
    missing = [name for name in coverage() if f"{name}(" not in tested and f"{name}<" not in tested]
    assert set(missing) <= elsewhere


@pytest.mark.parametrize(
    ("body", "weights", "operator"),
    [
        ("y = Hardmax<axis=1>(x)", {}, "Hardmax"),
        ('y = Resize<antialias=1, mode="linear">(x, , s)', {"s": f32(1, 1, 0.5, 0.5)}, "Resize"),
        ("y = ReduceMean(x, a)", {"a": ints(0)}, "ReduceMean"),
    ],
)
def test_refusals_name_the_operator(
    body: str, weights: dict[str, np.ndarray], operator: str
) -> None:
    with pytest.raises(UnsupportedOperator) as refusal:
        gradient_model(measure(model_of(body, MAP, weights), "x", MAP), "x", "y")
    assert refusal.value.op == operator
    assert refusal.value.node in str(refusal.value)
