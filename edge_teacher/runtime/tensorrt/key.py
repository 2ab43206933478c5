"""What an engine is valid for: one change in any field, and it is another engine."""

from __future__ import annotations

import hashlib
from types import ModuleType

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_teacher.runtime.cuda import Gpu
from edge_teacher.runtime.cut import digest

Shape = tuple[int, int, int, int]

LARGEST_BATCH = 32
"""Images an engine takes at once: a larger query goes through it in pieces."""
_FRONT_BYTES = 128 << 20


class Profile(msgspec.Struct, frozen=True):
    """Shapes of `images` [N, H, W, 3] an engine takes (TensorRT, "Working with Dynamic Shapes")."""

    least: Shape
    best: Shape
    """What it is tuned for."""
    most: Shape

    def takes(self, images: NDArray[np.uint8]) -> bool:
        """Whether images uint8[N, H, W, 3] are of a size within it; N is the session's affair."""
        return self.fits(images.shape[1], images.shape[2])

    def fits(self, height: int, width: int) -> bool:
        return all(
            low <= side <= high
            for low, side, high in zip(
                self.least[1:3], (height, width), self.most[1:3], strict=True
            )
        )


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the builder is told. There is no precision in it: that is decided in the graph."""

    level: int = 3
    """Builder optimisation level, 0 to 5: more time for building, less for running."""
    workspace_bytes: int = 1 << 30
    """On a Jetson the GPU's memory is everybody's: a build must not take all of it."""
    tf32: bool = True
    """Products of float32 in 19 bits where the GPU has it (Ampere and later)."""


def options_for(gpu: Gpu) -> Options:
    """On a small board the builder's workspace is an eighth of all memory."""
    return Options(workspace_bytes=min(Options().workspace_bytes, gpu.memory_bytes // 8))


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """What measurements of single layers, the timing cache, are valid for."""

    tensorrt: str
    """Module and version: `tensorrt 10.3.0`."""
    gpu: str
    architecture: str


class EngineKey(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine depends on."""

    graph: str
    """SHA-256 of the ONNX file it is made of."""
    outputs: tuple[str, ...]
    """Those it gives, sorted."""
    hardware: Hardware
    precision: str
    profile: Profile
    options: Options
    format: int = 1
    """Raised when the way engines are made here changes."""

    @property
    def digest(self) -> str:
        return digest_of(self)


def digest_of(struct: msgspec.Struct) -> str:
    """SHA-256 over every field, hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(struct, order="sorted")).hexdigest()


def version_of(module: ModuleType) -> str:
    return f"{module.__name__} {module.__version__}"


def hardware_of(module: ModuleType, gpu: Gpu) -> Hardware:
    return Hardware(tensorrt=version_of(module), gpu=gpu.name, architecture=gpu.architecture)


def key_of(
    hardware: Hardware,
    graph: bytes,
    outputs: tuple[str, ...],
    *,
    precision: str,
    profile: Profile,
    options: Options,
) -> EngineKey:
    """The key of the engine that gives `outputs` of an ONNX file."""
    return EngineKey(
        graph=digest(graph),
        outputs=tuple(sorted(outputs)),
        hardware=hardware,
        precision=precision,
        profile=profile,
        options=options,
    )


def profile_for(size: tuple[int, int], largest_batch: int = LARGEST_BATCH) -> Profile:
    """For a network that works at `size` (height, width) and is asked about images of other sizes too.

    From an eighth of the size to four times, or less where the pictures as float32 would take more than
    128 MiB: that much memory an engine reserves for its largest input.
    """
    height, width = size
    factor = next(
        (f for f in (4, 3, 2) if largest_batch * height * width * f * f * 12 <= _FRONT_BYTES), 1
    )
    return Profile(
        least=(1, max(1, height // 8), max(1, width // 8), 3),
        best=(largest_batch, height, width, 3),
        most=(largest_batch, factor * height, factor * width, 3),
    )
