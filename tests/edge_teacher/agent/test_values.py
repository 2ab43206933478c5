from __future__ import annotations

import numpy as np
import pytest

from edge_teacher.agent.values import Values
from edge_teacher.contract import quantised
from edge_teacher.contract.errors import RuntimeFailed
from edge_teacher.contract.messages import Answered

FOUND = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_floats_are_kept_as_they_travel(dtype: str) -> None:
    values = Values("features", dtype, by_channel=True)  # type: ignore[arg-type]
    kept = values.kept(FOUND)
    answered, tensors = values.answer(kept, Answered(compute_ms=1.0))
    assert tensors["features"].dtype == np.dtype({"f16": np.float16, "f32": np.float32}[dtype])
    assert np.allclose(tensors["features"], FOUND, atol=2e-3)
    assert (answered.compute_ms, answered.encode_error) == (1.0, 0.0)


def test_beyond_fp16_is_held_at_its_end_and_infinity_too() -> None:
    values = Values("features", "f16", by_channel=True)
    kept = values.kept(np.array([[1e6, -1e6, np.inf, 1.0]], np.float32))["features"]
    assert kept.tolist() == [[65504, -65504, 65504, 1]]


def test_u8_is_quantised_over_all_steps_together_and_says_what_it_lost() -> None:
    values = Values("features", "u8", by_channel=True)
    steps = [values.kept(FOUND[:1])["features"], values.kept(FOUND[1:])["features"]]
    before = Answered(compute_ms=1.0, encode_ms=5.0, encode_error=0.9)
    answered, tensors = values.answer({"features": np.concatenate(steps)}, before)
    assert np.allclose(quantised.floats(tensors, "features"), FOUND, atol=0.02)
    assert answered.encode_error == 0.9  # of what goes along, if that lost more
    assert answered.encode_ms > 5.0
    _, alone = values.answer({"features": FOUND}, Answered(compute_ms=1.0))
    assert np.array_equal(alone["features"], tensors["features"])


def test_what_is_not_finite_cannot_be_quantised() -> None:
    values = Values("saliency", "u8", by_channel=False)
    with pytest.raises(RuntimeFailed, match="the saliency are not all finite"):
        values.answer({"saliency": np.full((1, 2, 2), np.nan, np.float32)}, Answered(compute_ms=0))
