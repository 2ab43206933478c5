"""Random flips and shifts of training images, and of the feature maps that belong to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Jitter:
    """How each image of a batch was changed: flips bool[N], shifts int64[N, 2] (down, right)."""

    flips: Tensor
    shifts: Tensor

    @classmethod
    def draw(cls, count: int, shift: int, generator: torch.Generator) -> Jitter:
        return cls(
            torch.rand(count, generator=generator) < 0.5,
            torch.randint(-shift, shift + 1, (count, 2), generator=generator),
        )

    def rows(self, rows: Tensor) -> Jitter:
        """The jitter of some images of the batch, by their indices int64[M]."""
        return Jitter(self.flips[rows], self.shifts[rows])

    def images(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] -> the same, shifted, then flipped; mirrored at the borders."""
        n, height, width, _ = images.shape
        columns = torch.arange(width).expand(n, width)
        columns = torch.where(self.flips[:, None], width - 1 - columns, columns)
        columns = _mirrored(columns - self.shifts[:, 1:], width)
        rows = _mirrored(torch.arange(height) - self.shifts[:, :1], height)
        return images[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]

    def maps(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Feature maps [N, C, h, w] of images of height x width, moved as the images were.

        A shift of an image by some pixels is a shift of its map by a fraction of a cell, which is
        interpolated bilinearly.
        """
        down = self.shifts[:, 0].float() * 2 / height
        right = self.shifts[:, 1].float() * 2 / width
        mirror = torch.where(self.flips, -1.0, 1.0)
        theta = torch.zeros(len(maps), 2, 3)
        # Output (x, y) is read at input (mirror * x - right, y - down), as in `images`.
        theta[:, 0, 0] = mirror
        theta[:, 0, 2] = -right
        theta[:, 1, 1] = 1
        theta[:, 1, 2] = -down
        grid = F.affine_grid(theta, list(maps.shape), align_corners=False)
        return F.grid_sample(
            maps, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )


def with_views(
    images: NDArray[np.uint8], count: int, shift: int, random: torch.Generator
) -> NDArray[np.uint8]:
    """images [N, H, W, 3], then `count` jittered copies of each: [(1 + count) N, H, W, 3].

    An answer is remembered for an image as it is, so a teacher never sees what a step makes of it. A few
    fixed views it can be asked about like any other image, and they are always the same.
    """
    tensor = torch.from_numpy(images)
    views = [Jitter.draw(len(images), shift, random).images(tensor) for _ in range(count)]
    every: NDArray[np.uint8] = torch.cat([tensor, *views]).numpy()
    return every


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices outside 0 … size-1 reflected at the border pixel, which is not repeated."""
    period = max(2 * (size - 1), 1)
    index = index % period
    return torch.minimum(index, period - index) if size > 1 else torch.zeros_like(index)
