"""From the student's feature space to a teacher's: one learnt translator for each teacher."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class MapTranslator(nn.Sequential):
    """Feature maps [N, student, h, w] -> [N, teacher, h, w]: three 1x1 convolutions.

    Each has batch norm and LeakyReLU(0.1), as in the reference (Xie et al. 2022).
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        widths = [student_channels, teacher_channels, teacher_channels, teacher_channels]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.1),
            ]
        super().__init__(*layers)


class PooledTranslator(nn.Linear):
    """Pooled features [N, student] -> [N, teacher].

    Linear, because what it feeds on goes straight into the student's linear head: features that
    only a deep translator could read would be of no use there.
    """

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled)
