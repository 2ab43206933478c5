"""An owner's network to a signed teacher bundle.

torch module ──torch.onnx──▶ ONNX with its taps named ─┐
                                                       ├─export.graph──▶ images -> features, saliency
ONNX file ─────────────────────────────────────────────┘                       │
                                          float64 ──export.checks──▶ report.json ──▶ signed .fedsa
"""

from __future__ import annotations

import importlib.util
import io
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from torch import nn

from edge_teacher import bundle as bundles
from edge_teacher.bundle import Bundle, TeacherCard
from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.images import check_images
from edge_teacher.contract.messages import TapInfo, TeacherInfo
from export.checks.fp16 import to_half
from export.checks.teacher import check_teacher
from export.graph import build_teacher_graph
from export.graph.network import session
from export.inspect import load
from export.manifest import Manifest
from export.torch_to_onnx import torch_to_onnx

GRAPH = "teacher.onnx"
HALF = "teacher.fp16.onnx"
PROBE = "probe.images.npy"
LOGITS = "logits"
CHECKED_IMAGES = 8


@dataclass(frozen=True)
class Source:
    """The owner's network as ONNX, with the tensors its taps are."""

    model: onnx.ModelProto
    tensors: Mapping[str, str]
    logits: str | None
    """None: to be found."""
    module: nn.Module | None = None
    """The torch module it was exported from, to be held against."""


def export_teacher(
    manifest: Manifest,
    folder: Path,
    out: Path,
    key: Ed25519PrivateKey,
    photographs: NDArray[np.uint8] | None = None,
) -> Bundle:
    """Build, check, sign and write the bundle a manifest describes; its paths are relative to `folder`.

    `photographs`, uint8[N, H, W, 3], are what the checks are made on; without them, generated images. Raises
    UsageError for a network that cannot be loaded, UnsupportedNetwork for one the compiler refuses,
    CheckFailed if the graph does not compute what the network does.
    """
    if manifest.publish_probe and photographs is None:
        raise UsageError(
            f"{manifest.name!r} is to carry photographs (publish_probe), and none were given; name a "
            "folder with --photographs"
        )
    source = load_source(manifest, folder)
    graph = teacher_graph(source, manifest)
    if photographs is None:
        images = generated_images(manifest.input.size)
    else:
        images = check_images(photographs)[:CHECKED_IMAGES]
    report = check_teacher(
        graph,
        source.model,
        manifest,
        source.tensors,
        images,
        logits=source.logits,
        photographs=photographs is not None,
        module=source.module,
    )
    names = ["saliency", *(f"features.{name}" for name in manifest.taps)]
    saliency, *features = session(graph).run(names, {"images": images[:1]})
    info = TeacherInfo(
        name=manifest.name,
        version=manifest.version,
        input_size=manifest.input.size,
        taps={
            name: TapInfo(*found.shape[1:])
            for name, found in zip(manifest.taps, features, strict=True)
        },
        saliency_tap=manifest.saliency_at,
        saliency_size=(saliency.shape[1], saliency.shape[2]),
        saliency_kind=manifest.kind,
        gives_logits=manifest.publish_logits,
    )
    files = {
        GRAPH: graph.SerializeToString(),
        "report.json": msgspec.json.format(msgspec.json.encode(report), indent=1),
    }
    card = TeacherCard(teacher=info, graph=GRAPH)
    if manifest.half and report.half is not None and report.half.usable:
        files[HALF] = to_half(graph).SerializeToString()
        card = msgspec.structs.replace(card, half=HALF)
    if manifest.publish_probe:
        files[PROBE] = npy(images)
        card = msgspec.structs.replace(card, probe=PROBE)
    return bundles.write(out, card, files, key)


def npy(images: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    np.save(file, images)
    return file.getvalue()


def load_source(manifest: Manifest, folder: Path) -> Source:
    """The network of a manifest. Raises UsageError if it cannot be loaded, CheckFailed if not exported."""
    if manifest.onnx:
        return Source(load(folder / manifest.onnx), manifest.taps, manifest.logits or None)
    return source_of(load_module(manifest, folder), manifest)


def source_of(module: nn.Module, manifest: Manifest) -> Source:
    """A torch module with the taps of its manifest. Raises UsageError, and CheckFailed if not exported."""
    _require_tensors(module, manifest)
    model = torch_to_onnx(
        _Tapped(module, manifest.taps), manifest.input.shape, [LOGITS, *manifest.taps]
    )
    return Source(model, {name: name for name in manifest.taps}, LOGITS, module)


def teacher_graph(source: Source, manifest: Manifest) -> onnx.ModelProto:
    """images uint8[N, H, W, 3] -> features.<tap>, saliency[, logits]; opset 18, any N, H, W."""
    return build_teacher_graph(
        source.model,
        manifest.input,
        taps=source.tensors,
        saliency_tap=manifest.saliency_at,
        logits=source.logits,
        publish_logits=manifest.publish_logits,
        kind=manifest.kind,
        target=manifest.target,
        layout=manifest.layout,
    )


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


def generated_images(size: tuple[int, int], count: int = CHECKED_IMAGES) -> NDArray[np.uint8]:
    """Smooth random images, a little larger than the network's input so that the resizing is checked too."""
    generator = torch.Generator().manual_seed(0)
    height, width = (math.ceil(side * 1.25) for side in size)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    pixels = noisy.clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


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


def _require_tensors(module: nn.Module, manifest: Manifest) -> None:
    """Raises UsageError if the network or a tapped part gives anything but one tensor, or does not run."""
    given: dict[str, object] = {}
    hooks = [
        submodule(module, path).register_forward_hook(
            lambda _m, _i, output, name=name: given.__setitem__(f"tap {name!r}", output)
        )
        for name, path in manifest.taps.items()
    ]
    try:
        with torch.no_grad():
            given["the network"] = module(torch.zeros(2, *manifest.input.shape))
    except Exception as error:
        # The owner's code may raise anything.
        raise UsageError(
            f"the network of {manifest.name!r} does not run on float32{[2, *manifest.input.shape]}: "
            f"{' '.join(str(error).split())}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for what, output in given.items():
        if not isinstance(output, torch.Tensor):
            raise UsageError(
                f"{what} of {manifest.name!r} gives {type(output).__name__}, no tensor: wrap it in a "
                "module that returns the one tensor that is meant"
            )
