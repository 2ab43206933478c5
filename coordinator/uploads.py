"""Sending bytes that the other side may hold in part, or lose again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import Busy
from edge_teacher.contract.limits import UPLOAD_BYTES

Send = Callable[[int, NDArray[np.uint8]], int]
"""(offset, piece) -> the offset at which the receiver wants to go on."""


def upload(data: NDArray[np.uint8], send: Send, *, to: str) -> None:
    """Send `data: uint8[n]` until the receiver holds all of it.

    The first piece is empty: "how much of it have you got?" costs little, and what is there is not
    sent again. Raises Busy for a receiver that keeps losing what it is sent, and what `send` raises.
    """
    piece, offset = data[:0], 0
    # Begun again a few times, where something else took its place; not for ever.
    for _ in range(8 + 4 * (data.size // UPLOAD_BYTES)):
        offset = send(offset, piece)
        if offset >= data.size:
            return
        piece = data[offset : offset + UPLOAD_BYTES]
    raise Busy(f"{to} does not keep what it is sent; has it room for {data.size:,} bytes?")
