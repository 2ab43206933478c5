"""What a teacher must answer, by torch's own autograd in float64: the reference every graph is held to."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from export.graph import InputSpec


class TorchTeacher:
    """Resize, normalise, run, and Grad-CAM at one tap (method: "Grad-CAM at feature map A")."""

    def __init__(
        self, module: nn.Module, spec: InputSpec, taps: Mapping[str, str], saliency_tap: str
    ) -> None:
        """`taps`: tap name to dotted submodule name. The module itself is not changed."""
        self._module = copy.deepcopy(module).double().eval()
        self._spec = spec
        self._saliency_tap = saliency_tap
        self._seen: dict[str, Tensor] = {}
        for name, path in taps.items():
            self._module.get_submodule(path).register_forward_hook(
                lambda _m, _i, output, name=name: self._seen.__setitem__(name, output)
            )

    def answer(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
        """images uint8[N, H, W, 3] -> {`features.<tap>`: [N, C, h, w], `saliency`: [N, h, w]}."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
        if tuple(pixels.shape[-2:]) != tuple(self._spec.size):
            pixels = F.interpolate(pixels, self._spec.size, mode="bilinear", align_corners=False)
        mean = torch.tensor(self._spec.mean, dtype=torch.float64).view(1, -1, 1, 1)
        std = torch.tensor(self._spec.std, dtype=torch.float64).view(1, -1, 1, 1)
        logits: Tensor = self._module((pixels / 255 - mean) / std)
        features = self._seen[self._saliency_tap]
        # Images are independent, so the gradient of the sum is each image's own.
        (gradient,) = torch.autograd.grad(logits.amax(1).sum(), features)
        found = {f"features.{name}": seen.detach().numpy() for name, seen in self._seen.items()}
        found["saliency"] = grad_cam(features.detach(), gradient).numpy()
        return found


def grad_cam(features: Tensor, gradient: Tensor) -> Tensor:
    """[N, C, h, w] twice -> [N, h, w] in [0, 1]; a flat map becomes zeros."""
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    maps = torch.relu((weights * features).sum(1))
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp_min(1e-300), 0.0)
