from __future__ import annotations

import numpy as np
import pytest

from edge_teacher.agent.image_store import ImageStore
from edge_teacher.contract.errors import Busy, Malformed, NotFound, TooLarge
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import PutImages, Received
from tests.edge_teacher.nets import pictures

BLOCK = pictures(4)
BYTES = BLOCK.nbytes
EMPTY = np.zeros(0, np.uint8)


def put(store: ImageStore, block: np.ndarray, begin: int = 0, end: int | None = None) -> Received:
    request = PutImages(block=image_block_id(block), shape=block.shape, offset=begin)
    return store.put(request, block.reshape(-1)[begin:end])


@pytest.fixture
def store() -> ImageStore:
    return ImageStore(Limits(image_store_bytes=3 * BYTES))


def test_a_block_in_pieces_is_held_when_it_is_whole(store: ImageStore) -> None:
    assert put(store, BLOCK, 0, 0) == Received(next_offset=0, total_bytes=BYTES)
    assert put(store, BLOCK, 0, 100) == Received(next_offset=100, total_bytes=BYTES)
    with pytest.raises(NotFound):
        store.get(image_block_id(BLOCK))
    assert len(store) == 0
    assert put(store, BLOCK, 100).next_offset == BYTES
    assert np.array_equal(store.get(image_block_id(BLOCK)), BLOCK)
    assert len(store) == 4


def test_a_repeated_or_a_far_piece_changes_nothing(store: ImageStore) -> None:
    put(store, BLOCK, 0, 100)
    for begin, end in ((0, 100), (50, 150), (200, 300), (-100, None)):
        assert put(store, BLOCK, begin, end).next_offset == 100
    put(store, BLOCK, 100)
    assert put(store, BLOCK, 0, 100).next_offset == BYTES
    assert np.array_equal(store.get(image_block_id(BLOCK)), BLOCK)


def test_what_is_held_is_not_asked_for_again(store: ImageStore) -> None:
    put(store, BLOCK)
    assert put(store, BLOCK, 0, 0).next_offset == BYTES


def test_pixels_that_are_not_what_the_id_says_are_dropped(store: ImageStore) -> None:
    request = PutImages(block=image_block_id(BLOCK), shape=BLOCK.shape)
    with pytest.raises(Malformed, match="SHA-256"):
        store.put(request, (BLOCK ^ 1).reshape(-1))
    with pytest.raises(NotFound):
        store.get(image_block_id(BLOCK))
    assert put(store, BLOCK).next_offset == BYTES


def test_more_pixels_than_the_shape_are_dropped(store: ImageStore) -> None:
    request = PutImages(block=image_block_id(BLOCK), shape=BLOCK.shape)
    with pytest.raises(Malformed, match="exceeds"):
        store.put(request, np.zeros(BYTES + 1, np.uint8))
    assert put(store, BLOCK).next_offset == BYTES


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 8, 8, 1), (1, -8, 8, 3), (-1, -1, -1, 3)])
def test_a_shape_of_no_images_is_malformed(store: ImageStore, shape: tuple[int, ...]) -> None:
    with pytest.raises(Malformed, match="is no uint8"):
        store.put(PutImages(block="b", shape=shape), EMPTY)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        ((5, 8, 8, 3), Limits(max_images_per_block=4)),
        ((4, 8, 8, 3), Limits(max_block_bytes=BYTES - 1)),
        ((4, 8, 8, 3), Limits(image_store_bytes=BYTES - 1)),
        ((1, 2**31, 2**31, 3), Limits()),
    ],
)
def test_a_block_beyond_the_limits_takes_no_memory(
    shape: tuple[int, int, int, int], limits: Limits
) -> None:
    with pytest.raises(TooLarge):
        ImageStore(limits).put(PutImages(block="b", shape=shape), EMPTY)


def test_the_least_recently_used_block_makes_room(store: ImageStore) -> None:
    a, b, c, d = (pictures(4, seed) for seed in range(4))
    for block in (a, b, c):
        put(store, block)
    store.get(image_block_id(a))  # b is now the oldest
    put(store, b, 0, 0)  # and asking whether it is there is a use, too: now it is c
    put(store, d)
    for block in (a, b, d):
        assert np.array_equal(store.get(image_block_id(block)), block)
    with pytest.raises(NotFound, match=image_block_id(c)):
        store.get(image_block_id(c))
    assert len(store) == 12


def test_an_unfinished_block_can_be_evicted_and_begun_again(store: ImageStore) -> None:
    put(store, BLOCK, 0, 100)
    for seed in range(1, 4):
        put(store, pictures(4, seed))
    assert put(store, BLOCK, 100).next_offset == 0
    assert put(store, BLOCK).next_offset == BYTES


def test_without_memory_whole_blocks_make_room_and_then_it_is_busy() -> None:
    others = [pictures(4, seed) for seed in (1, 2)]
    room = [True]
    store = ImageStore(Limits(image_store_bytes=10 * BYTES), lambda _need: room[0])
    put(store, others[0])
    put(store, BLOCK, 0, 100)
    room[0] = False
    with pytest.raises(Busy, match="no memory for a block") as refused:
        put(store, others[1])
    assert refused.value.retry_after_s
    with pytest.raises(NotFound):
        store.get(image_block_id(others[0]))  # it had to go, in vain
    assert put(store, BLOCK, 100).next_offset == BYTES
