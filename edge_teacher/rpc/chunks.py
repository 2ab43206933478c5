"""Frames above 1 MiB travel in pieces: CRC-32 each, SHA-256 over the whole, missing ranges asked again."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator

import numpy as np

from edge_teacher.contract import frame
from edge_teacher.contract.errors import Malformed, TooLarge
from edge_teacher.contract.limits import CHUNK_BYTES
from edge_teacher.contract.messages import Chunk

WINDOW = 2
"""Chunks sent before the first credit arrives, and the most that one message can grant."""

MOST_RANGES = 16
"""Missing pieces that are asked for at once."""


def ranges(total_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of every chunk of a frame."""
    for offset in range(0, total_bytes, CHUNK_BYTES):
        yield offset, min(CHUNK_BYTES, total_bytes - offset)


def count(total_bytes: int) -> int:
    """Chunks of a frame."""
    return -(-total_bytes // CHUNK_BYTES)


def cut(payload: frame.Encoded, offset: int, length: int, sha256: str) -> bytes:
    """The chunk message for one range of `payload`."""
    pieces = payload.cut(offset, length)
    # One piece, but for the few ranges that lie across two tensors.
    piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    header = Chunk(
        offset=offset, total_bytes=payload.nbytes, crc32=zlib.crc32(piece), sha256=sha256
    )
    return frame.encode(header, {"data": np.frombuffer(piece, np.uint8)})


class Reassembly:
    """The receiving side of one chunked frame. Takes memory only for a total it was allowed."""

    def __init__(self, first: Chunk, most_bytes: int) -> None:
        if first.total_bytes < 1:
            raise Malformed(f"a chunk belongs to an answer of {first.total_bytes} bytes")
        if first.total_bytes > most_bytes:
            raise TooLarge(
                f"the answer has {first.total_bytes} bytes and this side takes {most_bytes}; "
                "ask about fewer images at once"
            )
        self.total_bytes = first.total_bytes
        self.sha256 = first.sha256
        # Not zeroed: a page is taken when its chunk comes, not because a header claimed it.
        self._buffer = np.empty(first.total_bytes, np.uint8)
        self._missing = dict(ranges(first.total_bytes))
        self._digest = hashlib.sha256()
        self._digested = 0

    def owns(self, chunk: Chunk) -> bool:
        """Whether `chunk` is a piece of this frame, not of another answer to the same question."""
        return (chunk.total_bytes, chunk.sha256) == (self.total_bytes, self.sha256)

    def add(self, chunk: Chunk, data: frame.Array) -> bool:
        """Take one chunk; True if it was new. A damaged or foreign one is dropped and stays missing."""
        if not self.owns(chunk):
            return False
        if self._missing.get(chunk.offset) != data.nbytes or zlib.crc32(data.data) != chunk.crc32:
            return False
        self._buffer[chunk.offset : chunk.offset + data.nbytes] = data
        del self._missing[chunk.offset]
        self._digest_what_is_contiguous()
        return True

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        return tuple(self._missing.items())

    def whole(self) -> memoryview:
        """The frame, where it was put together. Raises Malformed if it is not what was promised."""
        if self._missing or self._digest.hexdigest() != self.sha256:
            raise Malformed("the chunks of an answer do not add up to its SHA-256; ask again")
        return self._buffer.data.toreadonly()

    def _digest_what_is_contiguous(self) -> None:
        """While the next chunk is on its way, so that nothing is left to do after the last."""
        end = next(iter(self._missing), self.total_bytes)  # they stand in their order
        if end > self._digested:
            self._digest.update(self._buffer[self._digested : end].data)
            self._digested = end
