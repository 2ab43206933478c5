"""Asking one device about images: blocks sent once, two questions outstanding, answers in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.encodings import Came, Encoding, EncodingLedger, choose
from coordinator.uploads import upload
from edge_teacher.contract import frame, quantised
from edge_teacher.contract.errors import Malformed, NotFound, TooLarge
from edge_teacher.contract.frame import Payload
from edge_teacher.contract.images import Images, blocks, check_images, image_block_id
from edge_teacher.contract.messages import Answered, Card, Dtype, PutImages, Received
from edge_teacher.rpc.invoke import Caller

OUTSTANDING = 2
"""Questions on their way to one device: while it answers one, the next already waits there."""

PATIENCE_S = 120.0
"""How long one answer may take."""

_ATTEMPTS = 4
"""How often a block that is gone again is sent once more: others may ask the device, and need its store."""

Query = Callable[[str], msgspec.Struct]
"""Block id -> the query about it."""

Tensors = frame.Tensors


@dataclass(frozen=True)
class _Asked:
    """One round of questions: the same method and the same encoding for all blocks."""

    method: str
    query: Query
    tensor: str
    encoding: Encoding
    dtype: Dtype | None
    link_bytes_per_s: float | None

    def about(self, block_id: str) -> msgspec.Struct:
        query = self.query(block_id)
        return query if self.dtype is None else msgspec.structs.replace(query, dtype=self.dtype)


class Questions:
    """A device's ear. Not thread-safe: one thread asks one device."""

    def __init__(
        self,
        caller: Caller,
        card: Card,
        *,
        timeout_s: float = PATIENCE_S,
        ledger: EncodingLedger | None = None,
    ) -> None:
        """`ledger` is told what each answer with a `dtype` travelled as."""
        self.device = card.device
        self._card = card
        self._caller = caller
        self._limits = card.limits
        self._timeout_s = timeout_s
        self._ledger = ledger
        self._sent: set[str] = set()

    def ask(
        self,
        divided: Sequence[Images],
        method: str,
        query: Query,
        tensor: str,
        *,
        along: Sequence[Tensors] | None = None,
        dtype: Dtype | None = None,
    ) -> Iterator[tuple[Answered, NDArray[np.float32]]]:
        """The answer to each of the blocks, in order. Raises what the device answered.

        `along`: for each of the blocks the tensors that its query needs; none by default.

        `dtype`: what the values are to travel as; None: as the query says. Packing loses nothing, and
        is chosen by the speed of the link.
        """
        speed = self._caller.traffic.speed(self.device)
        encoding = choose(self._card, speed)
        if dtype is not None:
            encoding = msgspec.structs.replace(encoding, dtype=dtype)
        asked = _Asked(method, query, tensor, encoding, dtype, speed)

        def bodies() -> Iterator[msgspec.Struct]:
            for block in divided:
                yield self._body(block, asked)

        arriving = self._caller.answers(
            self.device,
            method,
            bodies(),
            along,
            outstanding=OUTSTANDING,
            timeout_s=self._timeout_s,
            packed=encoding.packed,
        )
        with closing(arriving):  # an error, or nobody who wants the rest: the device is told
            yield from self._in_order(arriving, divided, along, asked)

    def _in_order(
        self,
        arriving: Iterator[tuple[int, Future[Payload]]],
        divided: Sequence[Images],
        along: Sequence[Tensors] | None,
        asked: _Asked,
    ) -> Iterator[tuple[Answered, NDArray[np.float32]]]:
        # One that comes early waits for those before it; at most as many as are outstanding.
        early: dict[int, tuple[Answered, NDArray[np.float32]]] = {}
        due = 0
        for number, future in arriving:
            block = divided[number]
            try:
                payload = future.result()
            except NotFound:
                tensors = None if along is None else along[number]
                payload = self._ask_again(block, asked, tensors)
            early[number] = self._answer(payload, block, asked)
            while due in early:
                yield early.pop(due)
                due += 1

    def _ask_again(self, block: Images, asked: _Asked, tensors: Tensors | None) -> Payload:
        """The device has evicted the block, or restarted, or it has not got something else.

        Raises NotFound for something else, and for a block that it does not keep until it is asked about.
        """
        block_id = image_block_id(block)
        for _ in range(_ATTEMPTS):
            sent = self._put(block, block_id)
            answer = self._caller.submit(
                self.device,
                asked.method,
                asked.about(block_id),
                tensors,
                timeout_s=self._timeout_s,
                packed=asked.encoding.packed,
            )
            try:
                return answer.result()
            except NotFound:
                if not sent:  # it does hold the block
                    raise
        self._sent.discard(block_id)
        raise NotFound(
            f"{self.device} has evicted the image block {block_id} ({block.nbytes:,} bytes) "
            f"{_ATTEMPTS + 1} times before it could answer {asked.method}: its store of "
            f"{self._limits.image_store_bytes:,} bytes is too small for all who ask it; ask "
            "about fewer images at once, or from fewer coordinators"
        )

    def dtype(self) -> Dtype | None:
        """What answers should travel as, by the speed of the link; None before that is known."""
        speed = self._caller.traffic.speed(self.device)
        return None if speed is None else choose(self._card, speed).dtype

    def divide(self, images: Images, most_images: int | None = None) -> list[Images]:
        """`images` as the blocks this device takes, of at most `most_images` each."""
        most = self._limits.max_images_per_block
        return list(blocks(check_images(images), min(most, most_images or most)))

    def _body(self, block: Images, asked: _Asked) -> msgspec.Struct:
        block_id = image_block_id(block)
        if block_id not in self._sent:
            self._put(block, block_id)
        return asked.about(block_id)

    def _answer(
        self, payload: Payload, block: Images, asked: _Asked
    ) -> tuple[Answered, NDArray[np.float32]]:
        answered, tensors = self._caller.decode(payload, Answered)
        values = quantised.floats(tensors, asked.tensor)
        if values.ndim == 0 or len(values) != len(block):
            # Taken as it is, it would put every later answer beside the wrong image.
            raise Malformed(
                f"{self.device} answered {asked.method} about {len(block)} images with "
                f"{asked.tensor} {list(values.shape)}"
            )
        if self._ledger is not None and asked.dtype is not None:
            came = Came(answered, len(payload), values.size)
            self._ledger.note(self.device, asked.encoding, came, asked.link_bytes_per_s)
        return answered, values

    def _put(self, block: Images, block_id: str) -> bool:
        """Have the device hold it; whether anything was missing. Raises TooLarge, and what it answers."""
        most = min(self._limits.max_block_bytes, self._limits.image_store_bytes)
        if block.nbytes > most:
            raise TooLarge(
                f"{self.device} cannot hold the image block {block_id}: it has {block.nbytes:,} bytes, "
                f"and the device takes {most:,}; ask about fewer images at once"
            )
        pieces = 0

        def send(offset: int, piece: NDArray[np.uint8]) -> int:
            nonlocal pieces
            pieces += piece.size > 0
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
        return pieces > 0
