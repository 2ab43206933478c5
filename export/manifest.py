"""What an owner says about a network: one TOML file, or the flags of `fedsa export teacher --onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import tomllib
from msgspec import Meta

from edge_teacher.contract.errors import UsageError
from export.graph import InputSpec, Kind, MapLayout, Target


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network, what it wants as its input, and what may be asked of it. Paths are relative to the file.

    The network is either a torch module (`module` and `weights`) or an ONNX file (`onnx`).
    """

    name: str
    input: InputSpec
    taps: Annotated[dict[str, str], Meta(min_length=1)]
    """Tap name to the dotted name of the submodule whose output it is, or to the tensor of the ONNX file."""
    module: str = ""
    """`file.py:function`; the function returns the torch module."""
    weights: str = ""
    """State dict of the module."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function."""
    onnx: str = ""
    logits: str = ""
    """Tensor of the ONNX file with the class scores. Default: found, before any softmax."""
    kind: Kind = "gradcam"
    target: Target = Target()
    """Which scalar per image is explained. Default: the network's own top-1 class."""
    layout: MapLayout | None = None
    """Where the saliency tap has its channels and pixels. Default: inferred."""
    saliency_tap: str = ""
    """Default: the last of `taps`."""
    publish_logits: bool = False
    half: bool = True
    """Carry a copy in half precision for GPUs, if its maps agree and TensorRT takes it."""
    publish_probe: bool = False
    """Carry the photographs that were checked on, so that a device proves its runtimes on them too. They can
    then be seen by whoever has the bundle."""
    version: Annotated[int, Meta(ge=1)] = 1

    def __post_init__(self) -> None:
        if bool(self.onnx) == bool(self.module) or bool(self.weights) != bool(self.module):
            raise ValueError("name either a `module` and its `weights`, or a file with `onnx`")
        if self.saliency_at not in self.taps:
            raise ValueError(
                f"the saliency tap {self.saliency_tap!r} is none of the taps {', '.join(self.taps)}"
            )

    @property
    def saliency_at(self) -> str:
        return self.saliency_tap or list(self.taps)[-1]


def read_manifest(path: Path) -> Manifest:
    """Raises UsageError for a file that is missing, no TOML, or has unknown or wrong keys."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(values, Manifest)
    except OSError as error:
        raise UsageError(f"the manifest {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"the manifest {path} cannot be used: {error}") from error
