"""The coordinator's images on the device: content-addressed, resumable, bounded, in memory only."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import Busy, Malformed, NotFound, TooLarge
from edge_teacher.contract.images import Images, check_images, image_block_id
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import PutImages, Received

_RETRY_AFTER_S = 1.0


@dataclass
class _Block:
    pixels: Images
    filled: int = 0

    @property
    def whole(self) -> bool:
        return self.filled == self.pixels.nbytes


class ImageStore:
    """Blocks by id. The least recently used ones make room, so a query may be told 404: send it again."""

    def __init__(
        self, limits: Limits, has_room: Callable[[int], bool] = lambda _need: True
    ) -> None:
        """`has_room`: whether the process may take so many bytes more."""
        self._limits = limits
        self._has_room = has_room
        self._blocks: OrderedDict[str, _Block] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Images held."""
        with self._lock:
            return sum(len(block.pixels) for block in self._blocks.values() if block.whole)

    def limit(self, limits: Limits) -> None:
        """Other limits, from now on: the least recently used blocks beyond them are let go."""
        with self._lock:
            self._limits = limits
            self._make_room(0)

    def put(self, request: PutImages, data: NDArray[np.generic]) -> Received:
        """Take the piece that continues a block; any other is ignored and the answer says where to go on.

        Raises TooLarge or Busy before taking memory, Malformed if the finished block is not what its id
        says.
        """
        with self._lock:
            block = self._blocks.get(request.block)
            if block is None and not data.size:  # "have you got it?" takes nobody's place
                return Received(next_offset=0, total_bytes=self._size(request))
            block = block or self._new(request)
            if request.offset == block.filled and not block.whole:
                flat = block.pixels.reshape(-1)
                if block.filled + data.size > flat.size:
                    del self._blocks[request.block]
                    raise Malformed(f"the data of block {request.block} exceeds its shape")
                flat[block.filled : block.filled + data.size] = data
                block.filled += data.size
                if block.whole and image_block_id(block.pixels) != request.block:
                    del self._blocks[request.block]
                    raise Malformed(f"the images of block {request.block} have another SHA-256")
            self._blocks.move_to_end(request.block)
            return Received(next_offset=block.filled, total_bytes=block.pixels.nbytes)

    def get(self, block_id: str) -> Images:
        """uint8[N, H, W, 3]. Raises NotFound unless the block is held whole."""
        with self._lock:
            block = self._blocks.get(block_id)
            if block is None or not block.whole:
                raise NotFound(f"this device does not hold the image block {block_id}: send it")
            self._blocks.move_to_end(block_id)
            return block.pixels

    def _size(self, request: PutImages) -> int:
        """Bytes of the block. Raises Malformed, TooLarge."""
        n, height, width, channels = request.shape
        size = math.prod(request.shape)
        if min(request.shape) < 1 or channels != 3:
            raise Malformed(f"a block of shape {request.shape} is no uint8[N, H, W, 3]")
        most = min(self._limits.max_block_bytes, self._limits.image_store_bytes)
        if n > self._limits.max_images_per_block or size > most:
            raise TooLarge(
                f"a block of {n} images, {height} x {width}, {size} bytes is too large: at most "
                f"{self._limits.max_images_per_block} images and {most} bytes"
            )
        return size

    def _new(self, request: PutImages) -> _Block:
        size = self._size(request)
        self._make_room(size)
        # A whole block may be sent again; one that is still coming has somebody waiting for its rest.
        while not self._has_room(size):
            whole = next((key for key, block in self._blocks.items() if block.whole), None)
            if whole is None:
                raise Busy(
                    f"there is no memory for a block of {size:,} bytes now; send it again later",
                    retry_after_s=_RETRY_AFTER_S,
                )
            del self._blocks[whole]
        block = _Block(check_images(np.zeros(request.shape, np.uint8)))
        self._blocks[request.block] = block
        return block

    def _make_room(self, size: int) -> None:
        held = sum(block.pixels.nbytes for block in self._blocks.values())
        while self._blocks and held + size > self._limits.image_store_bytes:
            _, oldest = self._blocks.popitem(last=False)
            held -= oldest.pixels.nbytes
