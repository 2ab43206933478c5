"""A network as a user might have it: a ResNet with a classifier behind its last layer, and oddities."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


class OwnResNet(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = Block(width, width, 1)
        self.drop = nn.Dropout2d(dropout)
        self.layer4 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(2 * width, 4096), nn.ReLU(), nn.Linear(4096, 1000))
        self.forgotten = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.drop(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet() -> nn.Module:
    return OwnResNet()


def only_features() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 10, 3, 4, 1), nn.BatchNorm2d(10), nn.ReLU())


def fails() -> nn.Module:
    raise RuntimeError("no weights here")


def no_module() -> int:
    return 3


def takes_one_channel() -> nn.Module:
    return nn.Conv2d(1, 8, 3)


def leaves() -> nn.Module:
    raise SystemExit(0)


class Late(nn.Module):
    """Does well for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 8:
            raise RuntimeError("not today")
        found: Tensor = self.conv(x)
        return found


def late() -> nn.Module:
    return Late()


class Branching(nn.Module):
    """Can be trained, and has no one graph to export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.behind = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x)
        return self.behind(found * 2 if float(found.mean()) > 0 else found)


def branching() -> nn.Module:
    return Branching()


class Special(Branching):
    """Of an operator that ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(torch.special.bessel_j0(self.conv(x)))


def special() -> nn.Module:
    return Special()
