"""What kinds share whose head is one linear layer on an image's pooled features."""

from __future__ import annotations

from torch import Tensor, nn

from coordinator.augmentation import Jitter
from coordinator.kinds.kind import Features


class OnPooledFeatures:
    """One answer an image: where in it something is does not count, so a label never moves."""

    def head(self, features: int, classes: int, size: tuple[int, int]) -> nn.Module:
        return nn.Linear(features, classes)

    def logits(self, head: nn.Module, features: Features) -> Tensor:
        logits: Tensor = head(features.pooled)
        return logits

    def tail(self, head: nn.Module) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    def target(self, logits: Tensor) -> Tensor:
        """The largest logit: the class the net is surest of."""
        return logits.max(dim=1).values

    def moved(self, labels: Tensor, jitter: Jitter) -> Tensor:
        return labels
