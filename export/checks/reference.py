"""What a teacher must answer, by torch's own autograd in float64: the reference every graph is held to.

A torch module is differentiated by torch itself; an ONNX file through the interpreter in `autograd`. Both
give the taps, the logits and the gradient, and from there the maps are computed here, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checks.autograd import evaluate
from export.checks.parity import float32_branches, network_input, scalar
from export.graph import InputSpec, Kind, MapLayout, Target
from export.graph.network import Network


class Answers(Protocol):
    """A network whose tensors and gradients torch knows in float64."""

    def __call__(self, x: Tensor, wrt: str | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(logits, {tap: value}, the leaf that gradients are taken at) for the network's input `x`.

        The leaf is the tap `wrt`, or `x` itself for None.
        """
        ...


class OfModule:
    """A torch module; taps are the outputs of submodules. The module itself is not changed."""

    def __init__(self, module: nn.Module, taps: Mapping[str, str]) -> None:
        self._module = copy.deepcopy(module).double().eval()
        self._taps = taps

    def __call__(self, x: Tensor, wrt: str | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        seen: dict[str, Tensor] = {}
        x = x.double().requires_grad_(wrt is None)

        def keep(name: str, output: Tensor) -> Tensor:
            if name != wrt:
                seen[name] = output
                return output
            # What lies before the tap needs no graph; what comes next may work in place, not on a leaf.
            seen[name] = output.detach().requires_grad_(True)
            return seen[name].clone()

        hooks = [
            self._module.get_submodule(path).register_forward_hook(
                lambda _m, _i, output, name=name: keep(name, output)
            )
            for name, path in self._taps.items()
        ]
        try:
            logits: Tensor = self._module(x)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, seen, x if wrt is None else seen[wrt]


class OfNetwork:
    """An ONNX network; taps are its tensors. Raises UnknownOperator for what the interpreter lacks."""

    def __init__(self, network: Network, logits: str, taps: Mapping[str, str]) -> None:
        self._network, self._logits, self._taps = network, logits, taps

    def __call__(self, x: Tensor, wrt: str | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        leaf = self._network.input_name if wrt is None else self._taps[wrt]
        # Eigen-CAM needs no logits, and has none where the file leaves open which they are.
        names = [name for name in (self._logits, *self._taps.values()) if name]
        values = evaluate(self._network.model, {self._network.input_name: x}, names, leaves=[leaf])
        taps = {name: values[tensor] for name, tensor in self._taps.items()}
        if wrt is None:
            # All of the network lies between: on the branches that float32 took, as the teacher does.
            values = evaluate(
                self._network.model,
                {self._network.input_name: x},
                [self._logits],
                leaves=[leaf],
                anchors=float32_branches(self._network, self._logits, x),
            )
        return values[self._logits or leaf], taps, values[leaf]


def expected(
    answers: Answers,
    images: NDArray[np.uint8],
    spec: InputSpec,
    *,
    tap: str,
    kind: Kind,
    target: Target,
    layouts: Mapping[str, MapLayout],
) -> dict[str, NDArray[np.float64]]:
    """images uint8[N, H, W, 3] -> {`features.<tap>`: [N, C, h, w], `saliency`: [N, h, w]} in float64.

    `layouts`: of every tap.     Eigen-CAM has no derivative; its map is not among the answers.
    """
    x = torch.from_numpy(network_input(spec, images))
    by_tap = kind in ("gradcam", "eigencam")
    logits, values, leaf = answers(x, tap if by_tap else None)
    found = {
        f"features.{name}": as_maps(value.detach(), layouts[name]).numpy()
        for name, value in values.items()
    }
    if kind == "eigencam":
        return found
    # Images are independent, so the gradient of the sum is each image's own.
    (slope,) = torch.autograd.grad(scalar(logits, target).sum(), leaf, allow_unused=True)
    slope = torch.zeros_like(leaf) if slope is None else slope
    point = leaf.detach()
    if kind == "gradcam":
        maps, slopes = as_maps(point, layouts[tap]), as_maps(slope, layouts[tap])
        raw = torch.relu((slopes.mean((2, 3), keepdim=True) * maps).sum(1))
    else:
        channels = 1 if spec.layout == "NCHW" else 3
        raw = (
            slope.abs().amax(channels)
            if kind == "input_gradient"
            else (slope * point).sum(channels).abs()
        )
    found["saliency"] = scaled(raw).numpy()
    return found


def as_maps(value: Tensor, layout: MapLayout) -> Tensor:
    """A tap as [N, C, h, w], whatever its own layout."""
    if layout.axes == "NCHW":
        return value
    if layout.axes == "NHWC":
        return value.permute(0, 3, 1, 2)
    height, width = layout.size
    pixels = value[:, layout.skip : layout.skip + height * width]
    return pixels.transpose(1, 2).reshape(len(value), -1, height, width)


def scaled(maps: Tensor) -> Tensor:
    """[N, h, w] to [0, 1] per image; a flat map becomes zeros."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp_min(1e-300), 0.0)
