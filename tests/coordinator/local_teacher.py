"""A teacher that answers from a torch network in this process."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coordinator.student import scale_maps
from coordinator.teachers import as_sent
from edge_teacher.agent.pooling import attention_pool


class LocalTeacher:
    """Answers with any net of `stages`, a global mean and a linear `head`, by the closed form.

    Counts the images it was asked about, by method, in `asked`.
    """

    def __init__(self, name: str, stages: nn.Module, head: nn.Linear) -> None:
        self.name = name
        self.identity = name
        self.stages = stages.eval()
        self.head = head
        self.asked = {"saliency": 0, "pooled": 0, "attended": 0, "features": 0}

    def saliency(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        features = self._features(images, "saliency")
        top = self.head(features.mean((2, 3))).argmax(1)
        maps = torch.relu((self.head.weight[top][:, :, None, None] * features).sum(1))
        return scale_maps(maps).detach().numpy()

    def pooled(
        self, images: NDArray[np.uint8], *, mirrored: bool = False, tap: str | None = None
    ) -> NDArray[np.float32]:
        if mirrored:
            images = np.ascontiguousarray(images[:, :, ::-1])
        return self._features(images, "pooled", tap).mean((2, 3)).numpy()

    def attended(
        self,
        images: NDArray[np.uint8],
        attention: NDArray[np.float32],
        *,
        tap: str | None = None,
    ) -> NDArray[np.float32]:
        sent = as_sent(attention, len(images)).astype(np.float32)
        return attention_pool(self._features(images, "attended", tap).numpy(), sent)

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._features(images, "features").numpy()

    @torch.no_grad()
    def _features(
        self, images: NDArray[np.uint8], method: str, tap: str | None = None
    ) -> torch.Tensor:
        assert tap in (None, "last"), f"there is only one tap, and it is not {tap}"
        self.asked[method] += len(images)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return self.stages(x)


def random_teacher(name: str, seed: int, channels: int = 12, stride: int = 4) -> LocalTeacher:
    """An untrained net; its features tell colours and edges, which is enough for tests."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        stages = nn.Sequential(nn.Conv2d(3, channels, 5, stride, 2), nn.ReLU())
        return LocalTeacher(name, stages, nn.Linear(channels, 7))


def coloured_images(
    count: int, classes: int, seed: int, size: int = 16
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noisy images [count, size, size, 3] whose class shows in the tint of one half."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(60, 150, (count, size, size, 3))
    tints = np.array([[70, 0, 0], [0, 70, 0], [0, 0, 70], [70, 70, 0]])[:classes]
    images[:, : size // 2] += tints[labels][:, None, None, :]
    return images.astype(np.uint8), labels.astype(np.int64)
