"""zstd for tensors, where the `zstandard` package is installed. Level 1: the others cost more than they save.

A packed tensor states its size twice, in the header's shape and in its own frame; both are compared
before any memory is taken, since the library allocates whatever a frame claims.
"""

from __future__ import annotations

from typing import Any

from edge_teacher.contract.errors import Malformed

try:
    import zstandard
except ImportError:  # an option of the device; what is absent is not offered
    zstandard = None  # type: ignore[assignment]

LEVEL = 1
WORTH_ABOVE_BYTES = 4096
"""Below it a frame's own bytes and the call eat what packing saves."""


def available() -> bool:
    return zstandard is not None


def pack(data: Any) -> bytes | None:
    """`data`, a buffer, as one zstd frame; None where that would not be smaller."""
    packed = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(data)
    return packed if len(packed) < memoryview(data).nbytes else None


def unpack(data: memoryview, size: int) -> bytes:
    """The `size` bytes inside. Raises Malformed unless `data` is one frame that states just them."""
    if zstandard is None:
        raise Malformed("a tensor is packed with zstd, which this side has not offered")
    try:
        if zstandard.get_frame_parameters(data).content_size != size:
            raise Malformed(f"a packed tensor does not state the {size} bytes of its shape")
        found = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(
            data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise Malformed(f"a packed tensor is damaged: {error}") from error
    if len(found) != size:
        raise Malformed(f"a packed tensor holds {len(found)} bytes and not {size}")
    return bytes(found)
