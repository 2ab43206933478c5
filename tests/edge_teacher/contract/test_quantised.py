from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_teacher.contract import frame, quantised
from edge_teacher.contract.errors import Malformed

values = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=5),
    elements=st.floats(-1e4, 1e4, width=32),
)


@given(values, st.booleans())
def test_the_error_is_at_most_half_a_step_of_the_channel(
    array: np.ndarray, by_channel: bool
) -> None:
    tensors = quantised.quantise(array, "x", by_channel=by_channel)
    assert tensors["x"].dtype == np.uint8
    assert tensors["x"].shape == array.shape
    channels = array.shape[1] if by_channel else 1
    assert tensors["x.scale"].shape == tensors["x.zero"].shape == (channels,)
    found = quantised.floats(tensors, "x")
    step = tensors["x.scale"].reshape(
        [-1 if by_channel and i == 1 else 1 for i in range(array.ndim)]
    )
    assert (np.abs(found - array) <= 0.5 * step + 1e-3 * np.abs(array).max() + 1e-6).all()


def test_each_channel_has_its_own_scale() -> None:
    array = np.stack([np.linspace(0, 1, 256), np.linspace(0, 1000, 256)], axis=1).astype(np.float32)
    tensors = quantised.quantise(array, "x", by_channel=True)
    assert np.allclose(quantised.floats(tensors, "x"), array, rtol=1e-5)
    together = quantised.quantise(array, "x", by_channel=False)
    assert not np.allclose(quantised.floats(together, "x")[:, 0], array[:, 0], atol=0.4)


def test_other_dtypes_pass_through() -> None:
    found = quantised.floats({"x": np.array([0.5], np.float16)}, "x")
    assert (found.dtype, found.tolist()) == (np.float32, [0.5])


@pytest.mark.parametrize(
    "change",
    [
        {"x.scale": None},
        {"x.zero": None},
        {"x.scale": np.ones(2, np.float32)},
        {"x.scale": np.ones(2, np.float32), "x.zero": np.zeros(2, np.float32)},
        {"x.scale": np.array([np.nan] * 3, np.float32)},
        {"x.zero": np.array([np.inf] * 3, np.float32)},
        {"x.scale": np.ones(3, np.float16)},
        {"x.scale": np.ones((3, 1), np.float32)},
    ],
)
def test_scales_that_do_not_fit_are_malformed(change: dict[str, np.ndarray | None]) -> None:
    tensors: dict[str, frame.Array] = {
        "x": np.zeros((2, 3), np.uint8),
        "x.scale": np.ones(3, np.float32),
        "x.zero": np.zeros(3, np.float32),
    }
    quantised.floats(tensors, "x")
    for name, array in change.items():
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
    with pytest.raises(Malformed):
        quantised.floats(tensors, "x")


def test_the_relative_error_of_features_is_about_half_a_percent() -> None:
    array = np.maximum(np.random.default_rng(0).standard_normal((8, 16, 14, 14)), 0).astype(
        np.float32
    )
    tensors = quantised.quantise(array, "x", by_channel=True)
    assert 0.001 < quantised.relative_error(array, quantised.floats(tensors, "x")) < 0.008
    assert quantised.relative_error(np.zeros(3, np.float32), np.zeros(3, np.float32)) == 0
