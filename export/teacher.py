"""An owner's network to a signed teacher bundle.

network in torch ──torch.onnx──▶ ONNX with its taps named ──export.graph──▶ images -> features, saliency
                                                                  │
                                 float64 in torch ──checks──▶ report.json ──▶ signed .fedsa
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import onnx
import tomllib
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Meta
from torch import nn

from edge_teacher import bundle as bundles
from edge_teacher.bundle import Bundle, TeacherCard
from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.contract.messages import TapInfo, TeacherInfo
from edge_teacher.runtime import OnnxRuntimeSession
from export.checks.torch_teacher import TorchTeacher
from export.graph import InputSpec, build_teacher_graph
from export.torch_to_onnx import torch_to_onnx

GRAPH = "teacher.onnx"
LOGITS = "logits"
TOLERANCE = 1e-4
"""Largest deviation of any image's features or saliency from torch in float64, relative to that image's
largest value. The graph itself computes in float32."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner says about a network: one TOML file."""

    name: str
    module: str
    """`file.py:function`, relative to the manifest; the function returns the torch module."""
    weights: str
    """State dict of the module, relative to the manifest."""
    input: InputSpec
    taps: Annotated[dict[str, str], Meta(min_length=1)]
    """Tap name to the dotted name of the submodule whose output it is."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function."""
    saliency_tap: str = ""
    """Default: the last of `taps`."""
    publish_logits: bool = False
    version: Annotated[int, Meta(ge=1)] = 1

    @property
    def saliency_at(self) -> str:
        return self.saliency_tap or list(self.taps)[-1]


class TeacherReport(msgspec.Struct, frozen=True):
    """What was checked at export; travels in the bundle as report.json."""

    parameters: int
    checked_images: int
    feature_error: float
    """Largest relative deviation of the features from torch in float64, over the checked images."""
    saliency_error: float
    software: dict[str, str]


def read_manifest(path: Path) -> Manifest:
    """Raises UsageError for a file that is missing, no TOML, or has unknown or wrong keys."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        manifest = msgspec.convert(values, Manifest)
    except OSError as error:
        raise UsageError(f"the manifest {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"the manifest {path} cannot be used: {error}") from error
    if manifest.saliency_at not in manifest.taps:
        raise UsageError(
            f"{path}: the saliency tap {manifest.saliency_tap!r} is none of the taps "
            f"{', '.join(manifest.taps)}"
        )
    return manifest


def export_teacher(manifest_path: Path, out: Path, key: Ed25519PrivateKey) -> Bundle:
    """Build, check against torch in float64, sign and write the bundle a manifest describes.

    Raises UsageError for a manifest, module or weights that cannot be used, UnsupportedNetwork for a
    network the compiler refuses, CheckFailed if the graph does not compute what torch does.
    """
    manifest = read_manifest(manifest_path)
    module = load_module(manifest, manifest_path.parent)
    graph = teacher_graph(module, manifest)
    session = OnnxRuntimeSession(graph.SerializeToString(), threads=1, name=GRAPH)
    images = check_images(manifest.input.size)
    found = session.run(images, session.outputs)
    report = check(module, manifest, images, found)
    info = TeacherInfo(
        name=manifest.name,
        version=manifest.version,
        input_size=manifest.input.size,
        taps={name: TapInfo(*found[f"features.{name}"].shape[1:]) for name in manifest.taps},
        saliency_tap=manifest.saliency_at,
        saliency_size=_pair(found["saliency"].shape[1:]),
        saliency_kind="gradcam",
        gives_logits=manifest.publish_logits,
    )
    files = {
        GRAPH: graph.SerializeToString(),
        "report.json": msgspec.json.format(msgspec.json.encode(report), indent=1),
    }
    return bundles.write(out, TeacherCard(teacher=info, graph=GRAPH), files, key)


def load_module(manifest: Manifest, folder: Path) -> nn.Module:
    """The owner's module with its weights, in evaluation mode. Runs the owner's own Python file."""
    file, _, function = manifest.module.partition(":")
    path = folder / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None or not function:
        raise UsageError(
            f"the module {manifest.module!r} is no FILE.py:FUNCTION beside the manifest in {folder}"
        )
    source = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = source  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(source)
        module = getattr(source, function)(**manifest.arguments)
        state = torch.load(folder / manifest.weights, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except Exception as error:
        # The owner's code may raise anything; what it said is what helps.
        raise UsageError(
            f"the network of {manifest.name!r} ({manifest.module}, weights {manifest.weights}) "
            f"cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{manifest.module} returns {type(module).__name__}, no torch module")
    return module.eval()


def teacher_graph(module: nn.Module, manifest: Manifest) -> onnx.ModelProto:
    """images uint8[N, H, W, 3] -> features.<tap>, saliency[, logits]; opset 18, any N, H, W."""
    network = torch_to_onnx(
        _Tapped(module, manifest.taps), manifest.input.size, [LOGITS, *manifest.taps]
    )
    return build_teacher_graph(
        network,
        manifest.input,
        taps={name: name for name in manifest.taps},
        saliency_tap=manifest.saliency_at,
        logits=LOGITS,
        publish_logits=manifest.publish_logits,
    )


def check_images(size: tuple[int, int], count: int = 8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth random images, a little larger than the network's input so that the resizing is checked too."""
    generator = torch.Generator().manual_seed(0)
    height, width = (math.ceil(side * 1.25) for side in size)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    pixels = noisy.clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def check(
    module: nn.Module,
    manifest: Manifest,
    images: np.ndarray[Any, np.dtype[np.uint8]],
    found: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]],
) -> TeacherReport:
    """Compare the graph's outputs with torch in float64. Raises CheckFailed beyond TOLERANCE."""
    reference = TorchTeacher(module, manifest.input, manifest.taps, manifest.saliency_at)
    expected = reference.answer(images)
    errors = {}
    for name, want in expected.items():
        axes = tuple(range(1, want.ndim))
        scale = np.maximum(np.abs(want).max(axis=axes), 1e-12)
        errors[name] = float((np.abs(found[name] - want).max(axis=axes) / scale).max())
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= TOLERANCE:
        raise CheckFailed(
            f"the graph of {manifest.name!r} deviates from torch by {errors[worst]:.2g} in {worst} "
            f"(allowed {TOLERANCE:g}); this network must not be served"
        )
    return TeacherReport(
        parameters=sum(p.numel() for p in module.parameters()),
        checked_images=len(images),
        feature_error=max(v for name, v in errors.items() if name != "saliency"),
        saliency_error=errors["saliency"],
        software={"torch": str(torch.__version__), "onnx": onnx.__version__},
    )


class _Tapped(nn.Module):
    """(logits, the output of every tapped submodule): what torch.onnx is given to export."""

    def __init__(self, module: nn.Module, taps: Mapping[str, str]) -> None:
        super().__init__()
        self.module = module
        self._seen: dict[str, torch.Tensor] = {}
        for name, path in taps.items():
            submodule(module, path).register_forward_hook(self._keep(name))
        self._taps = list(taps)

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            self._seen[name] = output

        return hook

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self.module(x)
        return (logits, *(self._seen[name] for name in self._taps))


def submodule(module: nn.Module, path: str) -> nn.Module:
    """Raises UsageError naming the parts there are."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        known = ", ".join(
            name for name, _ in module.named_modules() if name.count(".") < 2 and name
        )
        raise UsageError(f"the network has no part {path!r} to tap; it has {known}") from error


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = shape
    return height, width
