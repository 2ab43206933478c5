"""Graphs with the batch written into them: freed where that is possible, refused where it is not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from export.graph import InputSpec, UnsupportedNetwork, prepare
from export.graph.network import session
from tests.export.graph.differentiate import model_of, random
from tests.export.graph.test_rules import f32, ints

IMAGE = (3, 8, 8)
SPEC = InputSpec(size=(8, 8))
MAP = (4, 8, 8)


def frozen(
    body: str, weights: dict[str, np.ndarray], batch: int | str, opset: int
) -> onnx.ModelProto:
    model = model_of(body, IMAGE, weights, opset)
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    first.Clear()
    if isinstance(batch, int):
        first.dim_value = batch
    else:
        first.dim_param = batch
    return model


FREED = {
    "flatten for a head": ("r = Reshape(x, s) y = MatMul(r, w)", {"s": ints(1, 192), "w": random(192, 5)}),
    "the rest inferred": ("r = Reshape(x, s) y = MatMul(r, w)", {"s": ints(1, -1), "w": random(192, 5)}),
    "channel shuffle": (
        "c = Conv(x, k) r = Reshape(c, s) t = Transpose<perm=[0,2,1,3,4]>(r) y = Reshape(t, u)",
        {"k": random(4, 3, 1, 1), "s": ints(1, 2, 2, 8, 8), "u": ints(1, 4, 8, 8)},
    ),
    "squeeze of everything": (
        "c = Conv(x, k) g = GlobalAveragePool(c) s = Squeeze(g) y = MatMul(s, w)",
        {"k": random(4, 3, 1, 1), "w": random(4, 5)},
    ),
    "resize to sizes": (
        'r = Resize<mode="linear">(x, none, none, z) y = Relu(r)',
        {"z": ints(1, 3, 16, 16), "none": f32()},
    ),
    "a class token": (
        "r = Reshape(x, s) t = Transpose<perm=[0,2,1]>(r) c = Concat<axis=1>(k, t) y = Exp(c)",
        {"s": ints(1, 3, 64), "k": random(1, 1, 3)},
    ),
    "attention, tokens first": (
        "r = Reshape(x, s) t = Transpose<perm=[2,0,1]>(r) h = Reshape(t, u) b = Transpose<perm=[1,0,2]>(h) "
        "a = Transpose<perm=[0,2,1]>(b) m = MatMul(b, a) p = Softmax(m) v = MatMul(p, b) "
        "w = Transpose<perm=[1,0,2]>(v) z = Reshape(w, q) y = Transpose<perm=[1,0,2]>(z)",
        {"s": ints(1, 8, 24), "u": ints(24, 4, 2), "q": ints(24, 1, 8)},
    ),
    "windows": (
        "r = Reshape(x, s) t = Transpose<perm=[0,2,4,3,5,1]>(r) w = Reshape(t, u) e = Exp(w) y = Reshape(e, v)",
        {"s": ints(1, 3, 2, 4, 2, 4), "u": ints(4, 16, 3), "v": ints(1, 192)},
    ),
    "a slice that takes all": ("y = Slice(x, b, e, b)", {"b": ints(0), "e": ints(1)}),
    "expand": ("g = ReduceMean(x, a) y = Expand(g, s)", {"a": ints(2, 3), "s": ints(1, 3, 4, 4)}),
    "reduction that drops axes": (
        "g = ReduceMean<keepdims=0>(x, a) r = Reshape(g, s) y = Exp(r)", {"a": ints(2, 3), "s": ints(1, 3, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("declared", [1, "N"])
@pytest.mark.parametrize("name", FREED)
def test_freed(name: str, declared: int | str) -> None:
    body, weights = FREED[name]
    model = frozen(body, weights, declared, 18)
    network = prepare(model, SPEC)
    images = random(4, *IMAGE)
    (together,) = session(network.model).run(None, {"x": images})
    alone = [session(model).run(None, {"x": images[i : i + 1]})[0] for i in range(4)]
    np.testing.assert_allclose(
        together.reshape(4, -1), np.stack(alone).reshape(4, -1), rtol=1e-4, atol=1e-5
    )


def test_a_batch_of_four_is_freed_too() -> None:
    body = "r = Reshape(x, s) y = MatMul(r, w)"
    model = frozen(body, {"s": ints(4, 192), "w": random(192, 5)}, 4, 18)
    images = random(4, *IMAGE)
    (expected,) = session(model).run(None, {"x": images})
    network = prepare(model, SPEC)
    (got,) = session(network.model).run(None, {"x": images[:3]})
    np.testing.assert_allclose(got, expected[:3], rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "weights", "words"),
    [
        ("g = Gather<axis=0>(x, i) y = Flatten(g)", {"i": np.int64(0)}, "Gather"),
        ("s = Squeeze(x, a) y = Exp(s)", {"a": ints(0)}, "drops the batch"),
        ("g = ReduceMean<keepdims=0>(x, a) y = Exp(g)", {"a": ints(0)}, "over the batch"),
        (
            "m = ReduceMax(x, a) s = Sub(x, m) r = Reshape(s, z) y = Exp(r)",
            {"a": ints(0), "z": ints(1, 192)}, "mixes",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_freed_is_refused(
    body: str, weights: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(UnsupportedNetwork, match=words) as refusal:
        prepare(frozen(body, weights, 1, 18), SPEC)
    assert "dynamic batch axis" in str(refusal.value)
