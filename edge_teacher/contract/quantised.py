"""Floats as uint8 with a scale: value = u8 * scale + zero.

By channel (axis 1) for [N, C, ...], one scale for all where there is no channel. The error of a value
is at most half its channel's scale, which is (max - min) / 255.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract import frame
from edge_teacher.contract.errors import Malformed

Floats = NDArray[np.float32]


def quantise(values: Floats, name: str, *, by_channel: bool) -> dict[str, frame.Array]:
    """`name: u8`, `name.scale: f32[C]`, `name.zero: f32[C]`; C is 1 without channels. Values are finite."""
    axes = tuple(i for i in range(values.ndim) if not (by_channel and i == 1))
    low = values.min(axis=axes).reshape(-1).astype(np.float32)
    scale = ((values.max(axis=axes).reshape(-1) - low) / 255).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1))
    shape = _along(values.ndim, by_channel)
    levels = np.rint((values - low.reshape(shape)) / scale.reshape(shape))
    return {
        name: np.clip(levels, 0, 255).astype(np.uint8),
        f"{name}.scale": scale,
        f"{name}.zero": low,
    }


def floats(tensors: Mapping[str, frame.Array], name: str) -> Floats:
    """The named tensor as float32, whatever of f16, f32 and u8 it travelled as. Raises Malformed."""
    array = tensors.get(name)
    if array is None or array.dtype != np.uint8:
        return frame.floats(tensors, name)
    scale = frame.tensor(tensors, f"{name}.scale", "f32", None)
    zero = frame.tensor(tensors, f"{name}.zero", "f32", len(scale))
    by_channel = len(scale) != 1
    if by_channel and (array.ndim < 2 or array.shape[1] != len(scale)):
        raise Malformed(f"tensor {name!r} {list(array.shape)} has {len(scale)} scales")
    if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
        raise Malformed(f"the scales of tensor {name!r} are not finite")
    shape = _along(array.ndim, by_channel)
    found: Floats = array.astype(np.float32)
    found *= scale.astype(np.float32, copy=False).reshape(shape)
    found += zero.astype(np.float32, copy=False).reshape(shape)
    return found


def relative_error(values: Floats, encoded: Floats) -> float:
    """Root mean square of the difference over that of the values; 0 for values that are all 0."""
    power = float(np.mean(np.square(values, dtype=np.float64)))
    lost = float(np.mean(np.square(values.astype(np.float64) - encoded)))
    return (lost / power) ** 0.5 if power > 0 else 0.0


def _along(dimensions: int, by_channel: bool) -> tuple[int, ...]:
    return tuple(-1 if by_channel and i == 1 else 1 for i in range(max(dimensions, 1)))
