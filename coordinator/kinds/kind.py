"""What a kind of task decides: its labels, its head, what teachers' features become, its loss, its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from coordinator.amalgamation.answers import TeacherAnswers
from coordinator.amalgamation.heads import TaskHead
from coordinator.augmentation import Jitter
from coordinator.image_files import Images
from edge_teacher.contract.decisions import Decision

Labels = NDArray[np.generic]


@dataclass(frozen=True)
class Features:
    """What the student's backbone gives for a batch: the map [N, C, h, w] and its mean [N, C]."""

    map: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, feature_map: Tensor) -> Features:
        return cls(feature_map, feature_map.mean((2, 3)))

    def rows(self, where: slice) -> Features:
        """Those of some images of the batch."""
        return Features(self.map[where], self.pooled[where])


@dataclass(frozen=True)
class Fit:
    """How a linear head is fitted: so many parts of cross-validation, dealt by `seed`; or `like` another."""

    folds: int
    seed: int
    like: TaskHead | None = None


@dataclass(frozen=True)
class Teaching:
    """What a task head on the teachers' features is fitted to.

    `answers` are those of the teachers this task selected; their probe rows are the images of every
    task, of which `own` are this one's, with `labels`.
    """

    answers: Sequence[TeacherAnswers]
    own: slice
    labels: Labels
    classes: int
    temperature: float
    """Of the soft targets; below 1 sharpens."""
    fit: Fit


@dataclass(frozen=True)
class Taught:
    """`soft` has a target for every transfer and probe image, in this order; on the task's own probe
    images it is the labels. `score` is the kind's first metric, in cross-validation; of `head`, which
    predicted them."""

    soft: Tensor
    score: float
    head: TaskHead


@dataclass(frozen=True)
class Moved:
    """How the images of a batch, all of size (height, width), were moved."""

    jitter: Jitter
    height: int
    width: int


class Kind(Protocol):
    """One kind of task. All of it is stateless: what is learnt lives in the head module."""

    name: str
    metrics: tuple[str, ...]
    """Names of what `measure` gives, each a fraction; gates and curves go by the first."""
    decision: Decision
    """How an answer is read off the logits, which have the classes on axis 1."""
    wants_maps: bool
    """Whether the teachers are asked for feature maps, besides pooled features."""
    dimensions: int
    """Of the logits, the batch included."""

    def read(self, path: Path) -> tuple[Images, Labels, tuple[str, ...]]:
        """Images, labels and class names of a labelled set. Raises UsageError."""
        ...

    def check(self, labels: Labels, images: Images, classes: Sequence[str], where: str) -> Labels:
        """The labels in the type that everything here takes. Raises UsageError for what are none."""
        ...

    def check_learnable(self, labels: Labels, classes: Sequence[str], where: str) -> None:
        """Raises UsageError for labels that tell no two images apart."""
        ...

    def renumbered(self, labels: Labels, order: NDArray[np.int64], classes: int) -> Labels:
        """The labels when class i is class order[i] of `classes`."""
        ...

    def targets(self, labels: Labels, classes: int) -> NDArray[np.float32]:
        """What of the labels a selection has teachers tell: float32[N, classes]."""
        ...

    def groups(self, labels: Labels) -> NDArray[np.int64]:
        """One class for each image, [N]: what a part of a set keeps the shares of."""
        ...

    def examples(self, labels: Labels, classes: Sequence[str], most: int) -> list[tuple[int, str]]:
        """(image, what is on it), one for each class that is there, at most so many; for people."""
        ...

    def head(self, features: int, classes: int, size: tuple[int, int]) -> nn.Module:
        """From a feature map of so many channels to logits; `size` (H, W) is the images'."""
        ...

    def logits(self, head: nn.Module, features: Features) -> Tensor:
        """[N, classes], or [N, classes, H, W]."""
        ...

    def tail(self, head: nn.Module) -> nn.Module:
        """`logits` as one module from the feature map [N, C, h, w], for export."""
        ...

    def target(self, logits: Tensor) -> Tensor:
        """The scalar of each image, [N], whose gradient is its saliency."""
        ...

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A scalar."""
        ...

    def moved(self, labels: Tensor, jitter: Jitter) -> Tensor:
        """The labels of images that were moved by `jitter`."""
        ...

    def teach(self, teaching: Teaching) -> Taught:
        """Fit a task head to the labels of the probe images, and predict for all the others."""
        ...

    def soft_loss(self, head: nn.Module, features: Features, soft: Tensor, moved: Moved) -> Tensor:
        """How far the head is from the targets `soft` of a batch of images; a scalar."""
        ...

    def refit(
        self, head: nn.Module, own: Features, labels: Labels, many: Features, fit: Fit
    ) -> None:
        """Make `head` the best linear one for the labels of `own`; `many` says how features vary.

        The maps of `many` may be of fewer images than its pooled features.
        """
        ...

    def kept(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """As much of a batch's logits as `measure` needs."""
        ...

    def measure(self, kept: NDArray[Any], labels: Labels) -> Mapping[str, float]:
        """By the names in `metrics`; `kept` of all images."""
        ...
