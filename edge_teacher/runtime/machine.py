"""What this machine has to execute graphs with, and why it has not the rest."""

from __future__ import annotations

import ctypes
import importlib
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime.cuda import LIBRARY, Cuda

GPU_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


@dataclass(frozen=True)
class Machine:
    """What was found; where something is None, `absent` says why."""

    cuda: Cuda | None
    tensorrt: ModuleType | None
    onnxruntime: ModuleType | None
    absent: dict[str, str]
    """Runtime (and provider) to the reason why it is not there."""

    @property
    def providers(self) -> tuple[str, ...]:
        """GPU providers that ONNX Runtime was built with: whether they work is another question."""
        if self.onnxruntime is None or self.cuda is None:
            return ()
        found = self.onnxruntime.get_available_providers()
        return tuple(p for p in GPU_PROVIDERS if p in found)


def driver_missing() -> str:
    """Why there can be no GPU here; empty if there may be one. Takes no time, other than looking at the GPU."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        return f"no CUDA driver: {error}"
    return ""


@cache
def find_machine() -> Machine:
    """Look at everything, once. Where there is a GPU this takes a second or more."""
    absent: dict[str, str] = {}
    missing = driver_missing()
    cuda = None
    if not missing:
        try:
            cuda = Cuda()
        except CheckFailed as error:
            missing = str(error)
    tensorrt = None if missing else _imported("tensorrt", absent)
    onnxruntime = _imported("onnxruntime", absent)
    if missing:
        absent["tensorrt"] = missing
    if tensorrt is not None and not _usable(tensorrt):
        absent["tensorrt"] = (
            f"tensorrt {tensorrt.__version__} is too old: 10 or later is needed (JetPack 6)"
        )
        tensorrt = None
    if onnxruntime is not None:
        built_with = onnxruntime.get_available_providers()
        for provider in GPU_PROVIDERS:
            if provider not in built_with:
                absent[f"onnxruntime {provider}"] = (
                    f"onnxruntime {onnxruntime.__version__} was built without it"
                )
            elif missing:
                absent[f"onnxruntime {provider}"] = missing
    return Machine(cuda, tensorrt, onnxruntime, absent)


def _usable(tensorrt: ModuleType) -> bool:
    major = str(tensorrt.__version__).split(".")[0]
    return major.isdigit() and int(major) >= 10


def _imported(name: str, absent: dict[str, str]) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        hint = (
            "; JetPack's is seen from a virtual environment made with --system-site-packages"
            if name == "tensorrt"
            else "; pip install onnxruntime"
        )
        absent[name] = f"Python {sys.version_info[0]}.{sys.version_info[1]} has no {name}{hint}"
    except (ImportError, OSError, RuntimeError) as error:
        absent[name] = f"{name} is installed and cannot be loaded: {' '.join(str(error).split())}"
    return None
