"""The little of CUDA that TensorRT leaves to its caller: a GPU's name, memory, copies and streams.

It is asked of the driver (libcuda.so.1: one name and one binary interface since CUDA 4, the same on a Jetson
and on a workstation) and not of the runtime library, whose name and structures change with every CUDA. The
context is the device's primary one, which TensorRT uses too (CUDA Driver API, "Primary Context Management").
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed, RuntimeFailed

LIBRARY = "libcuda.so.1"

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
"""Every function returns a CUresult, which is 0 when all is well."""

_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76  # CUdevice_attribute
_PORTABLE, _MAPPED = 1, 2  # of cuMemHostAlloc
_NON_BLOCKING = 1  # of cuStreamCreate


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, as far as an engine or a person cares."""

    name: str
    architecture: str
    """Compute capability: 8.7 on Orin, 11.0 on Thor."""
    memory_bytes: int
    integrated: bool
    """It shares the memory of the CPU, as on every Jetson: nothing needs to be copied."""
    cuda: str
    """The newest CUDA that the driver knows."""


class Cuda:
    """The first GPU. Every thread calls `use` first. What fails is a RuntimeFailed with the driver's word."""

    def __init__(self, library: Any = None) -> None:
        """Raises CheckFailed if there is no driver, or no GPU."""
        try:
            self._library = ctypes.CDLL(LIBRARY) if library is None else library
            for name, types in SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = types, c_int
        except (OSError, AttributeError) as error:
            raise CheckFailed(f"no CUDA driver: {error}") from error
        count, context, self._device = c_int(), c_void_p(), c_int()
        try:
            self._call("cuInit", 0)
            self._call("cuDeviceGetCount", byref(count))
            if not count.value:
                raise CheckFailed("the CUDA driver sees no GPU")
            self._call("cuDeviceGet", byref(self._device), 0)
            self._call("cuDevicePrimaryCtxRetain", byref(context), self._device)
        except RuntimeFailed as error:
            raise CheckFailed(f"no GPU can be used: {error}") from error
        self._context = context
        self.gpu = self._describe()

    def use(self) -> None:
        """Make the GPU this thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """What the GPU could still give. Makes the GPU this thread's."""
        self.use()
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def stream(self) -> int:
        found = c_void_p()
        self._call("cuStreamCreate", byref(found), _NON_BLOCKING)
        return found.value or 0

    def wait(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def end(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def buffer(self, size: int) -> Buffer:
        return Buffer(self, size)

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _describe(self) -> Gpu:
        name = ctypes.create_string_buffer(256)
        memory, version = c_size_t(), c_int()
        self._call("cuDeviceGetName", ctypes.addressof(name), len(name), self._device)
        self._call("cuDeviceTotalMem_v2", byref(memory), self._device)
        self._call("cuDriverGetVersion", byref(version))
        return Gpu(
            name=name.value.decode(errors="replace"),
            architecture=f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}",
            memory_bytes=memory.value,
            integrated=bool(self._attribute(_INTEGRATED)),
            cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        )

    def _attribute(self, number: int) -> int:
        found = c_int()
        self._call("cuDeviceGetAttribute", byref(found), number, self._device)
        return found.value

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            name, sentence = c_char_p(), c_char_p()
            self._library.cuGetErrorName(code, byref(name))
            self._library.cuGetErrorString(code, byref(sentence))
            said = [part.value.decode() for part in (name, sentence) if part.value]
            raise RuntimeFailed(f"{function} failed with {code} ({': '.join(said) or 'unknown'})")


class Buffer:
    """Page-locked memory, and what the GPU sees of it: the same if it is integrated, else its own copy."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self._mapped = cuda.gpu.integrated
        pointer, device = c_void_p(), c_uint64()
        flags = _PORTABLE | (_MAPPED if self._mapped else 0)
        cuda._call("cuMemHostAlloc", byref(pointer), size, flags)
        self._pointer = pointer.value or 0
        try:
            if self._mapped:
                cuda._call("cuMemHostGetDevicePointer_v2", byref(device), self._pointer, 0)
            else:
                cuda._call("cuMemAlloc_v2", byref(device), size)
        except RuntimeFailed:
            cuda._call("cuMemFreeHost", self._pointer)
            raise
        self.device = device.value
        """Address for the GPU."""
        self.host: NDArray[np.uint8] = np.frombuffer(
            memoryview((ctypes.c_uint8 * size).from_address(self._pointer)).cast("B"), np.uint8
        )

    def to_device(self, size: int, stream: int) -> None:
        """Begin to bring the first `size` bytes to the GPU."""
        if not self._mapped:
            self._cuda._call("cuMemcpyHtoDAsync_v2", self.device, self._pointer, size, stream)

    def to_host(self, size: int, stream: int) -> None:
        if not self._mapped:
            self._cuda._call("cuMemcpyDtoHAsync_v2", self._pointer, self.device, size, stream)

    def free(self) -> None:
        """Nothing may read `host` after that."""
        if not self._mapped:
            self._cuda._call("cuMemFree_v2", self.device)
        self._cuda._call("cuMemFreeHost", self._pointer)
