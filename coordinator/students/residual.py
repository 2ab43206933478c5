"""A small residual net (He et al., 2016): the default, and what most numbers in the docs are of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coordinator.students.convolution import conv_bn


class ResidualBlock(nn.Module):
    """`relu(f(x) + shortcut(x))` with two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, outputs, 3, stride), nn.ReLU(), conv_bn(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def residual(c: int) -> nn.Sequential:
    """float[N, 3, H, W] -> the feature map, float[N, 6c, H/8, W/8]."""
    return nn.Sequential(
        *(conv_bn(3, c, 3, stride=2), nn.ReLU()),
        ResidualBlock(c, c),
        ResidualBlock(c, 2 * c, stride=2),
        ResidualBlock(2 * c, 2 * c),
        # Width costs little on the smallest maps, and is what hints and heads read.
        ResidualBlock(2 * c, 6 * c, stride=2),
    )
