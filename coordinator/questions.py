"""Asking one device about images: blocks sent once, two questions outstanding, answers in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.uploads import upload
from edge_teacher.contract import frame
from edge_teacher.contract.errors import Malformed, NotFound
from edge_teacher.contract.images import Images, blocks, check_images, image_block_id
from edge_teacher.contract.messages import Answered, Card, PutImages, Received
from edge_teacher.rpc.invoke import Caller

OUTSTANDING = 2
"""Questions on their way to one device: while it answers one, the next already waits there."""

Query = Callable[[str], msgspec.Struct]
"""Block id -> the query about it."""


class Questions:
    """A device's ear. Not thread-safe: one thread asks one device."""

    def __init__(self, caller: Caller, card: Card, *, timeout_s: float = 120) -> None:
        self.device = card.device
        self._caller = caller
        self._limits = card.limits
        self._timeout_s = timeout_s
        self._sent: set[str] = set()

    def ask(
        self, divided: Iterable[Images], method: str, query: Query, tensor: str
    ) -> Iterator[tuple[Answered, NDArray[np.float32]]]:
        """The answer to each of the blocks, in order. Raises what the device answered."""
        waiting: deque[tuple[Images, Future[bytes]]] = deque()
        for block in divided:
            waiting.append((block, self._submit(block, method, query)))
            if len(waiting) > OUTSTANDING - 1:
                yield self._answer(*waiting.popleft(), method, query, tensor)
        while waiting:
            yield self._answer(*waiting.popleft(), method, query, tensor)

    def divide(self, images: Images) -> Iterator[Images]:
        """`images` as the blocks this device takes."""
        return blocks(check_images(images), self._limits.max_images_per_block)

    def _submit(self, block: Images, method: str, query: Query) -> Future[bytes]:
        block_id = image_block_id(block)
        if block_id not in self._sent:
            self._put(block, block_id)
        return self._caller.submit(self.device, method, query(block_id), timeout_s=self._timeout_s)

    def _answer(
        self, block: Images, future: Future[bytes], method: str, query: Query, tensor: str
    ) -> tuple[Answered, NDArray[np.float32]]:
        try:
            payload = future.result()
        except NotFound:
            # Evicted, or the device has restarted: send the block again, once.
            self._sent.discard(image_block_id(block))
            payload = self._submit(block, method, query).result()
        answered, tensors = frame.decode(payload, Answered)
        values = frame.floats(tensors, tensor)
        if values.ndim == 0 or len(values) != len(block):
            # Taken as it is, it would put every later answer beside the wrong image.
            raise Malformed(
                f"{self.device} answered {method} about {len(block)} images with "
                f"{tensor} {list(values.shape)}"
            )
        return answered, values

    def _put(self, block: Images, block_id: str) -> None:
        def send(offset: int, piece: NDArray[np.uint8]) -> int:
            received, _ = self._caller.call(
                self.device,
                "put_images",
                PutImages(block=block_id, shape=block.shape, offset=offset),
                {"data": piece},
                answer=Received,
                timeout_s=self._timeout_s,
            )
            return received.next_offset

        upload(block.reshape(-1), send, to=self.device)
        self._sent.add(block_id)
