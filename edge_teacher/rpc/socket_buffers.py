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
_FAST_IN_A_ROW = 2
_SLOW_IN_A_ROW = 4
"""A single long gap is a pause between two answers; on a slow link there are only long ones."""


class SocketBuffers:
    """Follows the speed of one connection. Used on that connection's thread."""

    def __init__(self) -> None:
        self._connection: Any = None
        self._size = 0
        self._fast = self._slow = 0
        self._last = 0.0

    def opened(self, connection: Any) -> None:
        self._connection = connection
        self._fast = self._slow = self._size = 0
        self._set(SMALL_BYTES)

    def moved(self, count: int) -> None:
        """So many bytes more have been received, or acknowledged."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        if count > took * _FAST_BYTES_PER_S:
            self._fast, self._slow = self._fast + 1, 0
        else:
            self._fast, self._slow = 0, self._slow + 1
        if self._fast >= _FAST_IN_A_ROW:
            self._set(LARGE_BYTES)
        elif self._slow >= _SLOW_IN_A_ROW:
            self._set(SMALL_BYTES)

    def _set(self, size: int) -> None:
        if size == self._size:
            return
        self._size = size
        # A TLS socket and a Unix socket may refuse; both work without.
        with contextlib.suppress(OSError, AttributeError):
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                self._connection.setsockopt(socket.SOL_SOCKET, buffer, size)
