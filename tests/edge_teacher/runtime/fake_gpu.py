"""A GPU made of main memory and a TensorRT made of ONNX Runtime, both able to fail when told to.

The driver's functions are real C function pointers, so arguments are converted as for the real library. Memory
of the GPU lies apart from that of the host: what nobody copies is not there. An "engine" is the ONNX file
behind a few words about where it was built.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from edge_teacher.runtime.cuda import SIGNATURES, Cuda

OUT_OF_MEMORY, NO_CONTEXT = 2, 201
_PREFIX = b"engine of "


class FakeDriver:
    """libcuda with `devices` GPUs. `fail`: function to the code that it returns."""

    def __init__(
        self, *, devices: int = 1, integrated: bool = False, memory: int = 1 << 30
    ) -> None:
        self.devices, self.integrated, self.memory = devices, integrated, memory
        self.fail: dict[str, int] = {}
        self.held: dict[int, Any] = {}
        self.calls: Counter[str] = Counter()
        self.streams = 0
        self._thread = threading.local()
        for name, types in SIGNATURES.items():
            setattr(self, name, CFUNCTYPE(c_int, *types)(self._counted(name)))

    def _counted(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls[name] += 1
            if self.fail.get(name):
                return self.fail[name]
            if name.startswith(("cuMem", "cuStream")) and not hasattr(self._thread, "context"):
                return NO_CONTEXT
            return getattr(self, f"_{name.removesuffix('_v2')}")(*arguments) or 0

        return call

    def _allocate(self, size: int) -> int | None:
        if sum(map(len, self.held.values())) + size > self.memory:
            return None
        array = (ctypes.c_uint8 * size)()
        self.held[ctypes.addressof(array)] = array
        return ctypes.addressof(array)

    def _cuInit(self, _flags: int) -> None: ...

    def _cuDriverGetVersion(self, version: Any) -> None:
        version[0] = 12060

    def _cuDeviceGetCount(self, count: Any) -> None:
        count[0] = self.devices

    def _cuDeviceGet(self, device: Any, number: int) -> None:
        device[0] = number

    def _cuDeviceGetName(self, name: int, _size: int, _device: int) -> None:
        ctypes.memmove(name, b"Orin\0", 5)

    def _cuDeviceTotalMem(self, total: Any, _device: int) -> None:
        total[0] = self.memory

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, _device: int) -> None:
        value[0] = {75: 8, 76: 7, 18: int(self.integrated)}[attribute]

    def _cuDevicePrimaryCtxRetain(self, context: Any, _device: int) -> None:
        context[0] = 4096

    def _cuCtxSetCurrent(self, context: int) -> int:
        self._thread.context = context
        return 0 if context == 4096 else NO_CONTEXT

    def _cuMemGetInfo(self, free: Any, total: Any) -> None:
        free[0] = self.memory - sum(map(len, self.held.values()))
        total[0] = self.memory

    def _cuMemAlloc(self, pointer: Any, size: int) -> int:
        found = self._allocate(size)
        pointer[0] = found or 0
        return 0 if found else OUT_OF_MEMORY

    def _cuMemFree(self, pointer: int) -> None:
        del self.held[pointer]

    def _cuMemHostAlloc(self, pointer: Any, size: int, _flags: int) -> int:
        return self._cuMemAlloc(pointer, size)

    def _cuMemFreeHost(self, pointer: int) -> None:
        del self.held[pointer]

    def _cuMemHostGetDevicePointer(self, device: Any, host: int, _flags: int) -> None:
        device[0] = host

    def _cuMemcpyHtoDAsync(self, device: int, host: int, size: int, _stream: int) -> None:
        ctypes.memmove(device, host, size)

    def _cuMemcpyDtoHAsync(self, host: int, device: int, size: int, _stream: int) -> None:
        ctypes.memmove(host, device, size)

    def _cuStreamCreate(self, stream: Any, _flags: int) -> None:
        self.streams += 1
        stream[0] = 7000 + self.streams

    def _cuStreamSynchronize(self, _stream: int) -> None: ...

    def _cuStreamDestroy(self, _stream: int) -> None:
        self.streams -= 1

    def _cuGetErrorName(self, code: int, name: Any) -> None:
        # Kept: C holds no reference.
        self.word = f"CUDA_ERROR_{code}".encode()
        name[0] = self.word

    def _cuGetErrorString(self, _code: int, sentence: Any) -> None:
        sentence[0] = b"as the script says"


class FakeTensorRT(ModuleType):
    """TensorRT as far as it is used here. Its faults are attributes."""

    def __init__(self, version: str = "10.3.0") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.built: list[bytes] = []
        """The ONNX files that were built, in order."""
        self.refuses: Callable[[bytes], str] = lambda _graph: ""
        """What the builder says against a graph."""
        self.gate: threading.Event | None = None
        """A build waits for it, or until it is cancelled."""
        self.begun = threading.Event()
        """A build is waiting."""
        self.loads = True
        self.executes = True
        self.factor: Callable[[bytes], float] = lambda _graph: 1.0
        """What answers of a graph are multiplied with."""
        self.contexts = 8
        """That can exist at once."""
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.BuilderFlag = SimpleNamespace(TF32="tf32")
        self.ILogger, self.IProgressMonitor = _Logger, _Monitor
        self.Builder = lambda log: _Builder(self, log)
        self.OnnxParser = _Parser
        self.Runtime = lambda log: _Runtime(self, log)
        self.nptype = lambda dtype: dtype


class _Logger:
    ERROR, INTERNAL_ERROR = "error", "internal"


class _Monitor: ...


class _Parser:
    num_errors = 1

    def __init__(self, network: SimpleNamespace, _log: object) -> None:
        self._network = network

    def parse(self, graph: bytes) -> bool:
        try:
            onnx.load_from_string(graph)
        except DecodeError:
            return False
        self._network.graph = graph
        return True

    def get_error(self, _index: int) -> str:
        return "this is no graph"


class _Builder:
    def __init__(self, module: FakeTensorRT, log: Any) -> None:
        self._module, self._log = module, log

    def create_network(self, flags: int) -> SimpleNamespace:
        assert flags == 2, "a strongly typed network"
        return SimpleNamespace(num_inputs=1, get_input=lambda _i: SimpleNamespace(name="images"))

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> SimpleNamespace:
        profile = SimpleNamespace(shapes={})
        profile.set_shape = lambda name, *shapes: profile.shapes.update({name: shapes})
        return profile

    def build_serialized_network(self, network: SimpleNamespace, config: _Config) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("build", None, 2)
        monitor.step_complete("build", 0)
        self._module.begun.set()
        while self._module.gate is not None and not self._module.gate.wait(0.01):
            if not monitor.step_complete("build", 0):
                return None
        monitor.phase_finish("build")
        refusal = self._module.refuses(network.graph)
        if refusal:
            self._log.log("error", refusal)
            return None
        self._module.built.append(network.graph)
        return _PREFIX + self._module.__version__.encode() + b"\n" + network.graph


class _Config:
    def __init__(self) -> None:
        self.builder_optimization_level = 3
        self.progress_monitor: Any = None
        self.timing = b""

    def set_memory_pool_limit(self, _pool: str, _size: int) -> None: ...

    def set_flag(self, _flag: str) -> None: ...

    def clear_flag(self, _flag: str) -> None: ...

    def add_optimization_profile(self, profile: SimpleNamespace) -> None:
        assert list(profile.shapes) == ["images"]

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, content: bytes, _ignore_mismatch: bool) -> bool:
        self.timing = content
        return content in (b"", b"measured")

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"measured")


class _Runtime:
    def __init__(self, module: FakeTensorRT, log: Any) -> None:
        self._module, self._log = module, log

    def deserialize_cuda_engine(self, engine: bytes) -> _Engine | None:
        head, _, graph = engine.partition(b"\n")
        if not self._module.loads or head != _PREFIX + self._module.__version__.encode():
            self._log.log("error", "the engine plan file is not compatible")
            return None
        return _Engine(self._module, self._log, graph)


class _Engine:
    def __init__(self, module: FakeTensorRT, log: Any, graph: bytes) -> None:
        self._module, self._log = module, log
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._names = ["images", *(o.name for o in self.session.get_outputs())]
        self.num_io_tensors = len(self._names)
        self.factor = module.factor(graph)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, _name: str) -> type:
        return np.float32

    def create_execution_context(self) -> _Context | None:
        if self._module.contexts <= 0:
            self._log.log("error", "no memory for another context")
            return None
        self._module.contexts -= 1
        return _Context(self._module, self._log, self)


class _Context:
    """Shapes are found by running the graph: on images of that shape, all zero."""

    def __init__(self, module: FakeTensorRT, log: Any, engine: _Engine) -> None:
        self._module, self._log, self._engine = module, log, engine
        self.active_optimization_profile = -1
        self._addresses: dict[str, int] = {}
        self._busy = threading.Lock()

    def __del__(self) -> None:
        self._module.contexts += 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "images"
        assert self.active_optimization_profile == 0
        self._shape = tuple(shape)
        names = [o.name for o in self._engine.session.get_outputs()]
        found = self._engine.session.run(names, {"images": np.zeros(shape, np.uint8)})
        self._shapes = {n: value.shape for n, value in zip(names, found, strict=True)}
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self._busy.acquire(blocking=False), "one context was used by two queries at once"
        try:
            assert stream
            if not self._module.executes:
                self._log.log("error", "an illegal memory access was encountered")
                return False
            images = _at(self._addresses["images"], self._shape, np.uint8).copy()
            found = self._engine.session.run(list(self._shapes), {"images": images})
            for name, value in zip(self._shapes, found, strict=True):
                _at(self._addresses[name], value.shape, np.float32)[...] = (
                    value * self._engine.factor
                )
            return True
        finally:
            self._busy.release()


def _at(address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


def fake_cuda(driver: FakeDriver | None = None) -> Cuda:
    return Cuda(driver or FakeDriver())
