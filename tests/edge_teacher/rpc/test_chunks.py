from __future__ import annotations

import hashlib
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_teacher.contract import frame
from edge_teacher.contract.errors import Malformed, TooLarge
from edge_teacher.contract.limits import CHUNK_BYTES
from edge_teacher.contract.messages import Chunk
from edge_teacher.rpc import chunks
from edge_teacher.rpc.chunks import Reassembly

Received = tuple[Chunk, frame.Array]
changed = msgspec.structs.replace


def encoded(payload: bytes) -> frame.Encoded:
    return frame.Encoded((payload,), len(payload))


def received(payload: bytes) -> list[Received]:
    digest = hashlib.sha256(payload).hexdigest()
    found = []
    for offset, length in chunks.ranges(len(payload)):
        chunk, tensors = frame.decode(chunks.cut(encoded(payload), offset, length, digest), Chunk)
        found.append((chunk, tensors["data"]))
    return found


PAYLOAD = random.Random(1).randbytes(3 * CHUNK_BYTES + 17)
PIECES = received(PAYLOAD)


@given(st.integers(0, 20 * CHUNK_BYTES))
def test_the_ranges_tile_the_frame(total: int) -> None:
    found = list(chunks.ranges(total))
    assert sum(length for _, length in found) == total
    assert all(0 < length <= CHUNK_BYTES for _, length in found)
    assert [offset for offset, _ in found] == [i * CHUNK_BYTES for i in range(len(found))]


@settings(deadline=None)
@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=12), st.randoms())
def test_any_order_and_any_number_of_repeats_gives_the_frame(
    repeats: list[int], shuffle: random.Random
) -> None:
    order = [*range(len(PIECES)), *repeats]
    shuffle.shuffle(order)
    parts = Reassembly(PIECES[0][0], 1 << 30)
    new = [parts.add(*PIECES[i]) for i in order]
    assert sum(new) == len(PIECES)
    assert parts.missing == ()
    assert parts.whole() == PAYLOAD


def test_missing_names_what_has_not_come() -> None:
    parts = Reassembly(PIECES[0][0], 1 << 30)
    parts.add(*PIECES[1])
    assert parts.missing == (
        (0, CHUNK_BYTES),
        (2 * CHUNK_BYTES, CHUNK_BYTES),
        (3 * CHUNK_BYTES, 17),
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c, d: (c, d ^ np.uint8(1)),
        lambda c, d: (c, d[:-1]),
        lambda c, d: (c, d[:0]),
        lambda c, d: (changed(c, crc32=c.crc32 ^ 1), d),
        lambda c, d: (changed(c, offset=c.offset + 1), d),
        lambda c, d: (changed(c, offset=-c.offset), d),
        lambda c, d: (changed(c, total_bytes=c.total_bytes + 1), d),
        lambda c, d: (changed(c, sha256="00" * 32), d),
    ],
    ids=["bit", "short", "empty", "crc", "offset", "negative", "total", "another frame's"],
)
def test_a_damaged_or_foreign_chunk_stays_missing(spoil) -> None:  # type: ignore[no-untyped-def]
    parts = Reassembly(PIECES[0][0], 1 << 30)
    assert not parts.add(*spoil(*PIECES[1]))
    assert len(parts.missing) == len(PIECES)
    assert parts.add(*PIECES[1])


def test_a_total_beyond_what_was_allowed_takes_no_memory() -> None:
    greedy = Chunk(offset=0, total_bytes=1 << 60, crc32=0, sha256="")
    with pytest.raises(TooLarge, match=str(1 << 60)):
        Reassembly(greedy, 1 << 20)


@pytest.mark.parametrize("total", [0, -1, -(1 << 62)])
def test_a_frame_of_no_bytes_is_malformed(total: int) -> None:
    with pytest.raises(Malformed):
        Reassembly(Chunk(offset=0, total_bytes=total, crc32=0, sha256=""), 1 << 20)


def test_chunks_that_add_up_to_something_else_are_malformed() -> None:
    lying = "11" * 32
    parts = Reassembly(Chunk(offset=0, total_bytes=5, crc32=0, sha256=lying), 1 << 20)
    chunk, tensors = frame.decode(chunks.cut(encoded(b"hello"), 0, 5, lying), Chunk)
    assert parts.add(chunk, tensors["data"])
    with pytest.raises(Malformed, match="SHA-256"):
        parts.whole()
