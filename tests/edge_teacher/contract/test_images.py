from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_teacher.contract.errors import Malformed
from edge_teacher.contract.images import blocks, check_images, image_block_id


def test_the_id_is_the_documented_digest() -> None:
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    expected = hashlib.sha256(struct.pack("<4I", 2, 3, 4, 3) + images.tobytes()).hexdigest()
    assert image_block_id(images) == expected
    assert image_block_id(images.reshape(2, 4, 3, 3)) != expected
    assert image_block_id(np.asfortranarray(images)) == expected
    assert image_block_id(images[::1, :, :, :]) == expected


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 4, 4, 3), np.int8),
        np.zeros((2, 3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((2, 0, 4, 3), np.uint8),
    ],
)
def test_anything_but_uint8_images_is_malformed(images: np.ndarray) -> None:
    with pytest.raises(Malformed, match="must be uint8"):
        check_images(images)


@given(
    n=st.integers(1, 40),
    side=st.integers(1, 6),
    most=st.integers(1, 10),
    block_bytes=st.integers(1, 400),
)
def test_blocks_are_all_images_in_order_within_both_bounds(
    n: int, side: int, most: int, block_bytes: int
) -> None:
    images = np.arange(n * side * side * 3, dtype=np.uint32).astype(np.uint8)
    images = images.reshape(n, side, side, 3)
    found = list(blocks(images, most, block_bytes))
    assert np.array_equal(np.concatenate(found), images)
    assert all(len(block) <= most for block in found)
    # A single image larger than a block is a block of its own.
    assert all(block.nbytes <= block_bytes or len(block) == 1 for block in found)
    assert len({len(block) for block in found[:-1]}) <= 1
