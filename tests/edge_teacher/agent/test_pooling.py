from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_teacher.agent.pooling import attention_pool, mean_pool
from edge_teacher.contract.errors import Malformed

torch.set_num_threads(1)
sizes = st.integers(1, 7)


def independent(features: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The formula through torch's bilinear resizing, in float64."""
    f, a = torch.from_numpy(features).double(), torch.from_numpy(attention).double()
    size = (features.shape[2], features.shape[3])
    a = torch.nn.functional.interpolate(a[:, None], size, mode="bilinear", align_corners=False)
    pooled: np.ndarray = ((f * a).sum((2, 3)) / a.sum((2, 3))).numpy()
    return pooled


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3), st.integers(1, 3), sizes, sizes, sizes, sizes, st.integers(0, 2**31))
def test_it_is_the_mean_under_the_resized_map(
    n: int, c: int, h: int, w: int, s: int, t: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    features = random.normal(size=(n, c, h, w)).astype(np.float32)
    attention = random.uniform(0.01, 1, (n, s, t)).astype(np.float32)
    found = attention_pool(features, attention)
    assert (found.shape, found.dtype) == ((n, c), np.float32)
    assert np.allclose(found, independent(features, attention), rtol=1e-4, atol=1e-5)


def test_the_plain_mean() -> None:
    features = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    expected = features.astype(np.float64).sum((2, 3)) / 20
    assert np.allclose(mean_pool(features), expected, atol=1e-6)
    assert np.allclose(
        attention_pool(features, np.ones((2, 7, 7), np.float32)), expected, atol=1e-6
    )


def test_a_map_of_zeros_gives_the_plain_mean_for_its_image_only() -> None:
    features = np.arange(2 * 1 * 2 * 2, dtype=np.float32).reshape(2, 1, 2, 2)
    attention = np.zeros((2, 2, 2), np.float32)
    attention[1, 0, 1] = 3
    assert attention_pool(features, attention).tolist() == [[1.5], [5.0]]


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 3e38])
def test_the_scale_of_a_map_does_not_matter(scale: float) -> None:
    random = np.random.default_rng(1)
    features = random.normal(size=(2, 3, 4, 4)).astype(np.float32)
    attention = random.uniform(0.1, 1, (2, 4, 4)).astype(np.float32)
    found = attention_pool(features, attention * np.float32(scale))
    assert np.allclose(found, independent(features, attention), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "attention",
    [
        np.ones((3, 4, 4)),
        np.ones((2, 16)),
        np.ones((2, 1, 4, 4)),
        np.ones((2, 0, 4)),
        np.ones((2, 4, 0)),
        -np.ones((2, 4, 4)),
        np.full((2, 4, 4), np.nan),
        np.full((2, 4, 4), np.inf),
    ],
)
def test_what_is_no_map_is_malformed(attention: np.ndarray) -> None:
    with pytest.raises(Malformed):
        attention_pool(np.ones((2, 3, 4, 4), np.float32), attention.astype(np.float32))
