"""The architectures by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from coordinator.students.mobilenet import mobilenet
from coordinator.students.residual import residual
from coordinator.students.vgg import vgg

ARCHITECTURES: Mapping[str, Callable[[int], nn.Module]] = {
    "residual": residual,
    "mobilenet": mobilenet,
    "vgg": vgg,
}
"""Name -> `channels` -> normalised images float[N, 3, H, W] to a feature map float[N, C, h, w]."""
