"""The payload of every message: a small typed header, then raw tensors.

    offset  size  content
    0       4     b"FSA1"
    4       4     header length h, uint32 little-endian
    8       h     MessagePack: {"body": <the message>, "tensors": [{name, dtype, shape, packed?}]}
    …             zero padding to a multiple of 64, then the first tensor, padding, the second, …

Tensors are C-contiguous and little-endian. Their places follow from their shapes, so a header has no
offset to lie about; decoding copies nothing and never executes anything. A tensor with `packed: k`
travels as one zstd frame of k bytes instead, to a peer that has asked for it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract import packing
from edge_teacher.contract.errors import Malformed

Payload = bytes | bytearray | memoryview
"""What a frame may lie in: an answer put together from chunks stays in the memory it was put in."""

Array = NDArray[np.generic]
Tensors = Mapping[str, Array]
Message = TypeVar("Message", bound=msgspec.Struct)

MAGIC = b"FSA1"
ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 20
MAX_DIMENSIONS = 6

_DTYPES: dict[str, np.dtype[np.generic]] = {
    "u8": np.dtype("u1"),
    "i64": np.dtype("<i8"),
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor of a frame, as its header has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    packed: int = 0
    """Bytes of the zstd frame it travels as; 0: it travels as it is. Since 1.1."""


class _Header(msgspec.Struct, frozen=True):
    body: msgspec.Raw
    tensors: tuple[TensorSpec, ...] = ()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Encoded:
    """A frame that has not been put into one piece of memory: large tensors are cut where they lie."""

    parts: tuple[bytes | memoryview, ...]
    nbytes: int

    def join(self) -> bytes:
        return b"".join(self.parts)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part)
        return digest.hexdigest()

    def cut(self, offset: int, length: int) -> list[memoryview]:
        """The bytes of one range, in pieces; copies nothing."""
        pieces, start = [], 0
        for part in self.parts:
            first, last = max(offset - start, 0), min(offset + length - start, len(part))
            if first < last:
                pieces.append(memoryview(part)[first:last])
            start += len(part)
        return pieces


def encode(message: msgspec.Struct, tensors: Mapping[str, Array] | None = None) -> bytes:
    """One payload. Raises TypeError for a dtype the wire does not have: that is a bug, not input."""
    return encode_parts(message, tensors).join()


def encode_parts(
    message: msgspec.Struct, tensors: Mapping[str, Array] | None = None, *, packed: bool = False
) -> Encoded:
    """One payload that refers to the tensors: they must not change for as long as it is used.

    `packed`: with zstd, those that become smaller by it. Raises TypeError as `encode` does.
    """
    specs: list[TensorSpec] = []
    data: list[bytes | memoryview] = []
    for name, given in (tensors or {}).items():
        array = np.asarray(given, order="C")
        dtype = _NAMES.get(array.dtype)
        if dtype is None:
            raise TypeError(f"tensor {name!r} has dtype {array.dtype}, not one of {list(_DTYPES)}")
        raw: bytes | memoryview = array.data.cast("B") if array.size else b""
        small = packing.pack(raw) if packed and len(raw) > packing.WORTH_ABOVE_BYTES else None
        specs.append(TensorSpec(name, dtype, array.shape, len(small) if small else 0))
        data.append(raw if small is None else small)
    body = msgspec.Raw(msgspec.msgpack.encode(message))
    header = msgspec.msgpack.encode(_Header(body, tuple(specs)))
    head = MAGIC + struct.pack("<I", len(header)) + header
    parts: list[bytes | memoryview] = [head]
    end = len(head)
    for raw in data:
        start = _aligned(end)
        parts += [bytes(start - end), raw]
        end = start + len(raw)
    return Encoded(tuple(parts), end)


def _possible(shape: tuple[int, ...], item_bytes: int) -> bool:
    """Whether numpy can have such an array; a size beside a zero counts, for numpy counts it too."""
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        return False
    # Python's integers: what would overflow int64 is caught here, not inside numpy.
    return math.prod(max(size, 1) for size in shape) * item_bytes < 1 << 63


def decode(
    payload: Payload, kind: type[Message], *, most_unpacked_bytes: int = 0
) -> tuple[Message, dict[str, Array]]:
    """The message and read-only views of its tensors. Raises Malformed for anything but a whole frame.

    `most_unpacked_bytes`: what packed tensors may take together; 0 accepts none.
    """
    view = memoryview(payload).toreadonly().cast("B")
    if len(view) < 8 or view[:4] != MAGIC:
        raise Malformed(f"the payload of {len(view)} bytes is no frame: it must begin with FSA1")
    (length,) = struct.unpack_from("<I", view, 4)
    if length > MAX_HEADER_BYTES or 8 + length > len(view):
        raise Malformed(f"the frame's header claims {length} bytes; {len(view) - 8} are there")
    try:
        header = msgspec.msgpack.decode(view[8 : 8 + length], type=_Header)
        message = msgspec.msgpack.decode(header.body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The last two are how msgspec refuses text that is not UTF-8 and nesting without end.
        raise Malformed(f"the frame holds no valid {kind.__name__}: {error}") from error
    tensors: dict[str, Array] = {}
    end = 8 + length
    for spec in header.tensors:
        dtype = _DTYPES.get(spec.dtype)
        if dtype is None:
            raise Malformed(f"tensor {spec.name!r} has the unknown dtype {spec.dtype!r}")
        if not _possible(spec.shape, dtype.itemsize) or not 0 <= spec.packed < 1 << 63:
            raise Malformed(f"tensor {spec.name!r} has the impossible shape {spec.shape}")
        if spec.name in tensors:
            raise Malformed(f"tensor {spec.name!r} is there twice")
        start, size = _aligned(end), math.prod(spec.shape) * dtype.itemsize
        end = start + (spec.packed or size)
        if end > len(view):
            raise Malformed(f"tensor {spec.name!r} of shape {spec.shape} is longer than its frame")
        if spec.packed:
            most_unpacked_bytes -= size
            if most_unpacked_bytes < 0:
                raise Malformed(f"tensor {spec.name!r} unpacks to {size} bytes: more than allowed")
            raw: Payload = packing.unpack(view[start:end], size)
        else:
            raw = view[start:end]
        if size == 0:
            tensors[spec.name] = np.empty(spec.shape, dtype)
        else:
            tensors[spec.name] = np.frombuffer(raw, dtype).reshape(spec.shape)
    if end != len(view):
        raise Malformed(f"the frame has {len(view) - end} bytes after its last tensor")
    return message, tensors


def tensor(tensors: Mapping[str, Array], name: str, dtype: str, *shape: int | None) -> Array:
    """The named tensor, checked: `None` in `shape` allows any size there. Raises Malformed."""
    array = tensors.get(name)
    if array is None:
        raise Malformed(f"tensor {name!r} is missing")
    fits = array.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=False)
    )
    if array.dtype != _DTYPES[dtype] or not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise Malformed(
            f"tensor {name!r} is {array.dtype}{list(array.shape)}, and must be {dtype}[{wanted}]"
        )
    return array


def floats(tensors: Mapping[str, Array], name: str) -> NDArray[np.float32]:
    """The named fp16 or fp32 tensor as float32. Raises Malformed."""
    array = tensors.get(name)
    if array is None or array.dtype.kind != "f":
        raise Malformed(f"the floating-point tensor {name!r} is missing")
    return array.astype(np.float32)
