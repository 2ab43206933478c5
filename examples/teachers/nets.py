"""The three small architectures the example teachers are made of.

Each is about 0.35 M parameters, ends in global average pooling and one linear layer, and works at
any input size. `tap` names the module whose output is the last feature stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class ResidualBlock(nn.Module):
    """`relu(f(x) + shortcut(x))` with two 3x3 convolutions (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, outputs, 3, stride), nn.ReLU(), conv_bn(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project (Sandler et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            conv_bn(inputs, hidden, 1),
            nn.ReLU6(),
            conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            conv_bn(hidden, outputs, 1),
        )
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.skip else y


class Classifier(nn.Module):
    """`stages`, then the mean over pixels, then one linear layer."""

    def __init__(self, stages: nn.Sequential, channels: int, classes: int) -> None:
        super().__init__()
        self.stages = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.stages(x)).flatten(1))
        return logits


def residual(classes: int) -> Classifier:
    stages = nn.Sequential(
        *(conv_bn(3, 16, 3), nn.ReLU()),
        ResidualBlock(16, 40, stride=2),
        ResidualBlock(40, 40),
        ResidualBlock(40, 96, stride=2),
        ResidualBlock(96, 96),
    )
    return Classifier(stages, 96, classes)


def vgg(classes: int) -> Classifier:
    stages = nn.Sequential(
        *(conv_bn(3, 20, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv_bn(20, 56, 3), nn.ReLU(), conv_bn(56, 56, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv_bn(56, 112, 3), nn.ReLU(), conv_bn(112, 112, 3), nn.ReLU()),
        *(conv_bn(112, 96, 3), nn.ReLU()),
    )
    return Classifier(stages, 96, classes)


def mobile(classes: int) -> Classifier:
    stages = nn.Sequential(
        *(conv_bn(3, 24, 3, stride=2), nn.ReLU6()),
        InvertedResidual(24, 32, stride=1, expansion=3),
        InvertedResidual(32, 56, stride=2, expansion=4),
        InvertedResidual(56, 56, stride=1, expansion=4),
        InvertedResidual(56, 80, stride=2, expansion=4),
        InvertedResidual(80, 80, stride=1, expansion=4),
        InvertedResidual(80, 96, stride=1, expansion=4),
        InvertedResidual(96, 96, stride=1, expansion=4),
        *(conv_bn(96, 144, 1), nn.ReLU6()),
    )
    return Classifier(stages, 144, classes)


ARCHITECTURES = {"residual": residual, "vgg": vgg, "mobile": mobile}
