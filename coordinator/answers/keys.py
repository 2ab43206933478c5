"""What an answer is remembered by: which network, which question, which image."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.messages import Dtype

KEY_BYTES = 32

Keys = NDArray[np.void]
"""[N] of 32 bytes each."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides an answer besides the image. Answers to one question are one store.

    Attributes:
        bundle: SHA-256 of the teacher's bundle.
        method: `saliency` or `features`.
        query: the query as JSON without its block and dtype: tap, form, mirrored and whatever a
            later version adds. A field at its default is left out, so that such an addition does
            not make what is known already unknown.
        image_size: (height, width): a network may answer in another size about another size.
        encoding: `u8` for what travelled as u8, which loses some 0.5 %; `f16` for all else.
    """

    bundle: str
    method: str
    query: str
    image_size: tuple[int, int]
    encoding: Dtype = "f16"

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def image_keys(images: NDArray[np.uint8], along: NDArray[np.float16] | None = None) -> Keys:
    """SHA-256 of each of the images uint8[N, H, W, 3], with its shape.

    `along` [N, s, s]: what was sent with each of them; it then is part of the key.
    """
    shape = np.asarray(images.shape[1:], "<u4").tobytes()
    each = np.ascontiguousarray(images).reshape(len(images), -1)
    digests = [hashlib.sha256(shape + image.data) for image in each]
    if along is not None:
        size = np.asarray(along.shape[1:], "<u4").tobytes()
        for digest, sent in zip(digests, np.ascontiguousarray(along), strict=True):
            digest.update(size + sent.tobytes())
    joined = b"".join(digest.digest() for digest in digests)
    return np.frombuffer(joined, f"V{KEY_BYTES}")
