"""Inverted residuals with depthwise convolutions (Sandler et al., 2018): fewer weights, more layers."""

from __future__ import annotations

from torch import Tensor, nn

from coordinator.students.convolution import conv_bn

_EXPANSION = 4


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without an activation; added to its input where both fit.

    ReLU rather than the paper's ReLU6: INT8 ranges are calibrated here, and need no clip.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        wide = _EXPANSION * inputs
        self.body = nn.Sequential(
            *(conv_bn(inputs, wide, 1), nn.ReLU()),
            *(conv_bn(wide, wide, 3, stride, groups=wide), nn.ReLU()),
            conv_bn(wide, outputs, 1),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def mobilenet(c: int) -> nn.Sequential:
    """float[N, 3, H, W] -> the feature map, float[N, 6c, H/8, W/8]."""
    return nn.Sequential(
        *(conv_bn(3, c, 3, stride=2), nn.ReLU()),
        InvertedResidual(c, c),
        InvertedResidual(c, 2 * c, stride=2),
        InvertedResidual(2 * c, 2 * c),
        InvertedResidual(2 * c, 3 * c, stride=2),
        *(conv_bn(3 * c, 6 * c, 1), nn.ReLU()),
    )
