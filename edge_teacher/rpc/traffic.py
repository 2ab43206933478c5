"""What went over the wire, and how fast: counted where it is sent and received."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass

WORTH_MEASURING_BYTES = 256 * 1024
"""Below it, the time a message takes says more of the round trip than of the link."""

_NEWEST = 0.3
"""Weight of the latest measurement."""


@dataclass
class WireBytes:
    """Payload bytes, by direction. MQTT's own few bytes per packet are not counted."""

    sent: int = 0
    received: int = 0


class Traffic:
    """Thread-safe."""

    def __init__(self) -> None:
        self.bytes: dict[str, dict[str, WireBytes]] = defaultdict(lambda: defaultdict(WireBytes))
        self._speed: dict[str, float] = {}
        self._lock = threading.Lock()

    def count(self, device: str, method: str, *, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            counted = self.bytes[device][method]
            counted.sent += sent
            counted.received += received

    def measured(self, device: str, count: int, seconds: float) -> None:
        """`count` bytes took `seconds` on their way; too few to say anything are left out."""
        if count < WORTH_MEASURING_BYTES or seconds <= 0:
            return
        with self._lock:
            before = self._speed.get(device, count / seconds)
            self._speed[device] = before * (1 - _NEWEST) + count / seconds * _NEWEST

    def speed(self, device: str) -> float | None:
        """Bytes per second to or from the device, as lately measured; None before enough has moved."""
        with self._lock:
            return self._speed.get(device)
