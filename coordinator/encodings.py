"""How answers travel: chosen from what a device offers, by how fast its link has been seen to be.

An encoding is worth its time when the link is slower than the encoder. zstd level 1 packs fp16 features
at 340 to 420 MB/s to about half; with what else has to be done to a byte, it pays below 100 MB/s. uint8
with a scale per channel halves them again and loses some 0.5 %, which is taken only where waiting would
cost more: below 5 MB/s.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import msgspec

from edge_teacher.contract.messages import Answered, Card, Dtype

PACK_BELOW_BYTES_PER_S = 100e6
QUANTISE_BELOW_BYTES_PER_S = 5e6


class Encoding(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for."""

    dtype: Dtype = "f16"
    packed: bool = False

    def __str__(self) -> str:
        return self.dtype + ("+zstd" if self.packed else "")


def choose(card: Card, bytes_per_s: float | None) -> Encoding:
    """For a link of that speed; fp16 as it is before the speed is known."""
    if bytes_per_s is None:
        return Encoding()
    slow = bytes_per_s < QUANTISE_BELOW_BYTES_PER_S and "u8" in card.encodings
    packed = bytes_per_s < PACK_BELOW_BYTES_PER_S and "zstd" in card.encodings
    return Encoding(dtype="u8" if slow else "f16", packed=packed)


class EncodingCost(msgspec.Struct, frozen=True, kw_only=True):
    """What one encoding was used for with one device, and what it cost.

    Attributes:
        answers: that came in it.
        bytes_received: of their frames.
        bytes_plain: they would have had as float32.
        encode_ms: spent by the device on bringing the values into the dtype, over all answers.
        largest_error: of an answer: root mean square of what was lost over that of the values.
        link_bytes_per_s: the speed that was measured when it was last chosen.
    """

    answers: int = 0
    bytes_received: int = 0
    bytes_plain: int = 0
    encode_ms: float = 0.0
    largest_error: float = 0.0
    link_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Came:
    """One answer, for the ledger."""

    answered: Answered
    bytes_received: int
    values: int


class EncodingLedger:
    """Device to encoding to cost. Thread-safe."""

    def __init__(self) -> None:
        self._costs: dict[str, dict[str, EncodingCost]] = {}
        self._lock = threading.Lock()

    def note(
        self, device: str, encoding: Encoding, came: Came, link_bytes_per_s: float | None
    ) -> None:
        with self._lock:
            of_device = self._costs.setdefault(device, {})
            before = of_device.get(str(encoding), EncodingCost())
            of_device[str(encoding)] = EncodingCost(
                answers=before.answers + 1,
                bytes_received=before.bytes_received + came.bytes_received,
                bytes_plain=before.bytes_plain + 4 * came.values,
                encode_ms=round(before.encode_ms + came.answered.encode_ms, 3),
                largest_error=max(before.largest_error, came.answered.encode_error),
                link_bytes_per_s=link_bytes_per_s,
            )

    def costs(self) -> dict[str, dict[str, EncodingCost]]:
        with self._lock:
            return {device: dict(found) for device, found in sorted(self._costs.items())}
