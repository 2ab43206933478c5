"""The payload of every message: a small typed header, then raw tensors.

    offset  size  content
    0       4     b"FSA1"
    4       4     header length h, uint32 little-endian
    8       h     MessagePack: {"body": <the message>, "tensors": [{name, dtype, shape}]}
    …             zero padding to a multiple of 64, then the first tensor, padding, the second, …

Tensors are C-contiguous and little-endian. Their places follow from their shapes, so a header has no
offset to lie about; decoding copies nothing and never executes anything.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import Malformed

Array = NDArray[np.generic]
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


class TensorSpec(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: tuple[int, ...]


class _Header(msgspec.Struct, frozen=True):
    body: msgspec.Raw
    tensors: tuple[TensorSpec, ...] = ()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def encode(message: msgspec.Struct, tensors: Mapping[str, Array] | None = None) -> bytes:
    """One payload. Raises TypeError for a dtype the wire does not have: that is a bug, not input."""
    arrays = {name: np.asarray(array, order="C") for name, array in (tensors or {}).items()}
    specs = []
    for name, array in arrays.items():
        dtype = _NAMES.get(array.dtype)
        if dtype is None:
            raise TypeError(f"tensor {name!r} has dtype {array.dtype}, not one of {list(_DTYPES)}")
        specs.append(TensorSpec(name, dtype, array.shape))
    body = msgspec.Raw(msgspec.msgpack.encode(message))
    header = msgspec.msgpack.encode(_Header(body, tuple(specs)))
    parts: list[bytes | memoryview] = [MAGIC, struct.pack("<I", len(header)), header]
    end = 8 + len(header)
    for array in arrays.values():
        start = _aligned(end)
        parts += [bytes(start - end), array.data.cast("B") if array.size else b""]
        end = start + array.nbytes
    return b"".join(parts)


def _possible(shape: tuple[int, ...], item_bytes: int) -> bool:
    """Whether numpy can have such an array; a size beside a zero counts, for numpy counts it too."""
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        return False
    # Python's integers: what would overflow int64 is caught here, not inside numpy.
    return math.prod(max(size, 1) for size in shape) * item_bytes < 1 << 63


def decode(payload: bytes, kind: type[Message]) -> tuple[Message, dict[str, Array]]:
    """The message and read-only views of its tensors. Raises Malformed for anything but a whole frame."""
    if len(payload) < 8 or payload[:4] != MAGIC:
        raise Malformed(f"the payload of {len(payload)} bytes is no frame: it must begin with FSA1")
    (length,) = struct.unpack_from("<I", payload, 4)
    if length > MAX_HEADER_BYTES or 8 + length > len(payload):
        raise Malformed(f"the frame's header claims {length} bytes; {len(payload) - 8} are there")
    try:
        header = msgspec.msgpack.decode(memoryview(payload)[8 : 8 + length], type=_Header)
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
        if not _possible(spec.shape, dtype.itemsize):
            raise Malformed(f"tensor {spec.name!r} has the impossible shape {spec.shape}")
        if spec.name in tensors:
            raise Malformed(f"tensor {spec.name!r} is there twice")
        start = _aligned(end)
        end = start + math.prod(spec.shape) * dtype.itemsize
        if end > len(payload):
            raise Malformed(f"tensor {spec.name!r} of shape {spec.shape} is longer than its frame")
        if end == start:
            tensors[spec.name] = np.empty(spec.shape, dtype)
        else:
            flat = np.frombuffer(payload, dtype, math.prod(spec.shape), start)
            tensors[spec.name] = flat.reshape(spec.shape)
    if end != len(payload):
        raise Malformed(f"the frame has {len(payload) - end} bytes after its last tensor")
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
