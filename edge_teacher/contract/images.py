"""Image blocks: what `put_images` sends and every query names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import Malformed

Images = NDArray[np.uint8]

BLOCK_BYTES = 768 * 1024
"""A block of small images fits one message; a larger image is a block of its own, sent in pieces."""


def image_block_id(images: Images) -> str:
    """SHA-256, hexadecimal, over the shape as four little-endian uint32 and the bytes."""
    digest = hashlib.sha256(np.asarray(images.shape, "<u4").tobytes())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def check_images(images: NDArray[np.generic]) -> Images:
    """uint8[N, H, W, 3] with at least one pixel. Raises Malformed."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise Malformed(
            f"images are {images.dtype}{list(images.shape)}, and must be uint8[N, H, W, 3] "
            "with at least one image"
        )
    return images.astype(np.uint8, copy=False)


def blocks(images: Images, most_images: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Images]:
    """Consecutive runs of `images`, each of about `block_bytes` and at most `most_images`."""
    per_image = int(np.prod(images.shape[1:]))
    step = max(1, min(most_images, block_bytes // per_image))
    for start in range(0, len(images), step):
        yield images[start : start + step]
