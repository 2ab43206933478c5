"""Executing engines: pinned memory, a stream and a context for each query that runs at once."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed, RuntimeFailed
from edge_teacher.contract.messages import RuntimeInfo
from edge_teacher.runtime.cuda import Buffer, Cuda
from edge_teacher.runtime.tensorrt.build import logger
from edge_teacher.runtime.tensorrt.key import Profile

log = logging.getLogger(__name__)

LANES = 2
"""Queries that run at once: while one computes, the other's images and answers are copied."""


class TensorRTSession:
    """One engine, for any number of images of the sizes within its profile."""

    def __init__(
        self,
        module: ModuleType,
        cuda: Cuda,
        engine: bytes,
        *,
        profile: Profile,
        precision: str,
        name: str = "the graph",
        lanes: int = LANES,
    ) -> None:
        """Raises CheckFailed if TensorRT cannot load the engine or memory does not suffice."""
        self._module = module
        self._cuda = cuda
        self._profile = profile
        self._precision = precision
        self._name = name
        self._log = logger(module)
        self._closed = threading.Event()
        seen = self._log.count
        cuda.use()
        self._runtime = module.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise CheckFailed(
                f"TensorRT {module.__version__} cannot load the engine of {name}: "
                f"{self._log.since(seen) or 'it gives no reason'}"
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._outputs = tuple(n for n in names if n != "images")
        if "images" not in names or not self._outputs:
            raise CheckFailed(
                f"the engine of {name} has the tensors {', '.join(names)} and no images"
            )
        self._lanes: list[_Lane] = []
        self._free: queue.SimpleQueue[_Lane | None] = queue.SimpleQueue()
        try:
            for _ in range(lanes):
                self._add_lane()
        except (CheckFailed, RuntimeFailed) as error:
            if not self._lanes:
                raise CheckFailed(f"{name} does not fit into the GPU's memory: {error}") from error
            log.warning("%s runs %d at a time: %s", name, len(self._lanes), error)

    @property
    def info(self) -> RuntimeInfo:
        gpu = self._cuda.gpu
        return RuntimeInfo(
            name="tensorrt",
            version=self._module.__version__,
            provider=gpu.name,
            threads=len(self._lanes),
            precision=self._precision,
            engine="ready",
            gpu=f"{gpu.name} ({gpu.architecture})",
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._outputs

    def fits(self, images: NDArray[np.uint8]) -> bool:
        """Whether the engine was built for images uint8[N, H, W, 3] of this size."""
        return self._profile.takes(images)

    def run(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        if not self.fits(images):
            low, high = self._profile.least[1:3], self._profile.most[1:3]
            raise RuntimeFailed(
                f"the engine of {self._name} takes images from {low} to {high} and not "
                f"{images.shape[1:3]}: resize them"
            )
        unknown = set(outputs) - set(self._outputs)
        if unknown:
            raise RuntimeFailed(
                f"the engine of {self._name} has no output {', '.join(sorted(unknown))}"
            )
        most = self._profile.most[0]
        with self._lane() as lane:
            try:
                pieces = [
                    lane.run(images[start : start + most], outputs)
                    for start in range(0, max(1, len(images)), most)
                ]
            except RuntimeFailed:
                raise
            except Exception as error:  # the bindings raise types of Python's own
                raise RuntimeFailed(
                    f"TensorRT failed on images {list(images.shape)}: {error}"
                ) from error
        if len(pieces) == 1:
            return pieces[0]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in outputs}

    def close(self) -> None:
        """Let what runs end, then give the memory back. A query after that is refused."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._cuda.use()
        for _ in range(len(self._lanes)):
            lane = self._free.get()
            if lane is not None:
                lane.free()
        self._lanes.clear()
        self._free.put(None)  # for who still waits for a lane
        self._engine = self._runtime = None

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _add_lane(self) -> None:
        seen = self._log.count
        context = self._engine.create_execution_context()
        if context is None:
            raise CheckFailed(self._log.since(seen) or "TensorRT gives no execution context")
        lane = _Lane(self._module, self._cuda, self._engine, context, self._profile, self._outputs)
        self._lanes.append(lane)
        self._free.put(lane)

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        lane = self._free.get()
        if lane is None:
            self._free.put(None)  # the next one waits too
            raise RuntimeFailed(f"the session of {self._name} is closed")
        try:
            yield lane
        finally:
            self._free.put(lane)


class _Lane:
    """A context with its stream and its memory, for one query at a time."""

    def __init__(
        self,
        module: ModuleType,
        cuda: Cuda,
        engine: Any,
        context: Any,
        profile: Profile,
        outputs: tuple[str, ...],
    ) -> None:
        self._cuda = cuda
        self._context = context
        self._log = logger(module)
        self._stream = cuda.stream()
        self._buffers: dict[str, Buffer] = {}
        self._dtypes = {
            name: np.dtype(module.nptype(engine.get_tensor_dtype(name))) for name in outputs
        }
        try:
            if context.active_optimization_profile != 0:
                context.set_optimization_profile_async(0, self._stream)
            self._shape(profile.most)
            self._reserve("images", int(np.prod(profile.most)))
            for name, dtype in self._dtypes.items():
                self._reserve(name, self._values(name) * dtype.itemsize)
        except (CheckFailed, RuntimeFailed):
            self.free()
            raise

    def run(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        seen = self._log.count
        self._cuda.use()  # a query may come on any thread
        self._shape(images.shape)
        taken = self._buffers["images"]
        np.copyto(taken.host[: images.size].reshape(images.shape), images)
        taken.to_device(images.size, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise RuntimeFailed(
                f"TensorRT failed on images {list(images.shape)}: "
                f"{self._log.since(seen) or 'it gives no reason'}"
            )
        views = {}
        for name in outputs:
            shape, dtype = tuple(self._context.get_tensor_shape(name)), self._dtypes[name]
            size = int(np.prod(shape)) * dtype.itemsize
            self._buffers[name].to_host(size, self._stream)
            views[name] = self._buffers[name].host[:size].view(dtype).reshape(shape)
        self._cuda.wait(self._stream)
        # A copy: the next query writes into the same memory.
        return {name: view.astype(np.float32) for name, view in views.items()}

    def free(self) -> None:
        self._context = None
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()
        self._cuda.end(self._stream)

    def _shape(self, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape("images", shape):
            raise RuntimeFailed(f"TensorRT takes no images {list(shape)}: {self._log.since(0)}")

    def _values(self, name: str) -> int:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(side < 0 for side in shape):
            raise CheckFailed(f"the size of {name}, {shape}, depends on the pictures")
        return int(np.prod(shape))

    def _reserve(self, name: str, size: int) -> None:
        buffer = self._buffers[name] = self._cuda.buffer(max(size, 1))
        if not self._context.set_tensor_address(name, buffer.device):
            raise RuntimeFailed(f"TensorRT takes no memory for {name}: {self._log.since(0)}")
