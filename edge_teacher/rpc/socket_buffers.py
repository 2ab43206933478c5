"""How much of a bulk connection's data the kernel may hold: little on a slow link, much on a fast one.

What lies in a socket's buffers is what everything on the same link waits behind: 128 KiB are 100 ms at
10 Mbit/s. On a fast link as little means a thread switch for every 128 KiB, which costs a third.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

SMALL_BYTES = 128 * 1024
LARGE_BYTES = 1024 * 1024
_FAST_BYTES_PER_S = 30e6
_SLOW_BYTES_PER_S = 15e6
_PAUSE_S = 0.5
"""Longer between two messages, and it was not the link that took the time."""
_NEWEST = 0.3


class SocketBuffers:
    """Follows the speed of one connection. Used on that connection's thread."""

    def __init__(self) -> None:
        self._connection: Any = None
        self._size = SMALL_BYTES
        self._speed: float | None = None
        self._last = 0.0

    def opened(self, connection: Any) -> None:
        self._connection = connection
        self._speed = None
        self._set(SMALL_BYTES)

    def moved(self, count: int) -> None:
        """So many bytes more have been received, or acknowledged."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        if took > _PAUSE_S:
            # Either a pause, or a link so slow that a chunk takes this long.
            self._set(SMALL_BYTES)
            self._speed = None
            return
        speed = count / max(took, 1e-4)
        self._speed = (
            speed if self._speed is None else self._speed * (1 - _NEWEST) + speed * _NEWEST
        )
        if self._speed > _FAST_BYTES_PER_S:
            self._set(LARGE_BYTES)
        elif self._speed < _SLOW_BYTES_PER_S:
            self._set(SMALL_BYTES)

    def _set(self, size: int) -> None:
        if size == self._size and self._speed is not None:
            return
        self._size = size
        # A TLS socket and a Unix socket may refuse; both work without.
        with contextlib.suppress(OSError, AttributeError):
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                self._connection.setsockopt(socket.SOL_SOCKET, buffer, size)
