"""Feature maps to a few numbers per channel: the mean, or the mean under an attention map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import Malformed

Floats = NDArray[np.float32]


def mean_pool(features: Floats) -> Floats:
    """[N, C, h, w] -> [N, C]."""
    n, channels, height, width = features.shape
    # As a product with a vector: BLAS takes a seventh of the time that a reduction over two axes does.
    share = np.full(height * width, 1 / (height * width), np.float32)
    mean: Floats = features.reshape(n * channels, height * width) @ share
    return mean.reshape(n, channels)


def attention_pool(features: Floats, attention: Floats) -> Floats:
    """sum_u A(u) F_c(u) / sum_u A(u), with A resized to the features' size: [N, C, h, w] -> [N, C].

    An attention map that is zero everywhere carries no preference: its image gets the plain mean.
    Raises Malformed as `check_attention` does.
    """
    n, _, height, width = features.shape
    check_attention(attention, n)
    # Only the shape of a map counts, so its scale must not: neither overflow nor vanish in the sums.
    peak = attention.max(axis=(1, 2), keepdims=True)
    attention = (attention / np.where(peak > 0, peak, 1)).astype(np.float32)
    rows = _interpolation(attention.shape[1], height)
    columns = _interpolation(attention.shape[2], width)
    weights = np.einsum("hs,nst,wt->nhw", rows, attention, columns, optimize=True).reshape(
        n, 1, height * width
    )
    total = weights.sum(axis=2)
    flat = features.reshape(n, -1, height * width)
    weighted = (flat * weights).sum(axis=2) / np.maximum(total, 1e-12)
    pooled: Floats = np.where(total > 1e-12, weighted, flat.mean(axis=2)).astype(np.float32)
    return pooled


def check_attention(attention: Floats, images: int) -> None:
    """Raises Malformed for maps of another number, with negative or non-finite values."""
    if attention.ndim != 3 or len(attention) != images or 0 in attention.shape:
        raise Malformed(f"the attention is {list(attention.shape)}, and must be [{images}, s, s]")
    if not np.isfinite(attention).all() or attention.min() < 0:
        raise Malformed("the attention has negative or non-finite values")


def _interpolation(source: int, target: int) -> Floats:
    """The matrix [target, source] of linear interpolation with half-pixel centres, edges held."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, source - 1)
    matrix = np.zeros((target, source), np.float32)
    matrix[np.arange(target), below] += (1 - (position - below)).astype(np.float32)
    matrix[np.arange(target), above] += (position - below).astype(np.float32)
    return matrix
