"""Plain 3x3 convolutions and max pooling (Simonyan and Zisserman, 2015), with batch norm."""

from __future__ import annotations

from torch import nn

from coordinator.students.convolution import conv_bn


def vgg(c: int) -> nn.Sequential:
    """float[N, 3, H, W] -> the feature map, float[N, 6c, H/8, W/8]."""
    layers: list[nn.Module] = []
    inputs = 3
    for widths in ((c,), (2 * c, 2 * c), (4 * c, 4 * c)):
        for width in widths:
            layers += [conv_bn(inputs, width, 3), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, conv_bn(inputs, 6 * c, 3), nn.ReLU())
