"""One class for every image: softmax and cross-entropy, measured by accuracy.

On disk `<class>/<name>.jpg`, or an .npz with `images`, `labels` (integers [N]) and, optionally, `classes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from coordinator.amalgamation.heads import fit_task_head
from coordinator.image_files import Images, decode, image_files, npz_arrays, npz_images
from coordinator.kinds.kind import Features, Fit, Labels, Moved, Taught, Teaching
from coordinator.kinds.pooled import OnPooledFeatures
from edge_teacher.contract.decisions import Decision
from edge_teacher.contract.errors import UsageError


class SingleLabel(OnPooledFeatures):
    """labels int64[N], indices into the classes."""

    name = "single-label"
    metrics: tuple[str, ...] = ("accuracy",)
    decision: Decision = "top-1"
    wants_maps = False
    dimensions = 2

    def read(self, path: Path) -> tuple[Images, Labels, tuple[str, ...]]:
        if path.suffix == ".npz":
            return _read_npz(path)
        files: list[tuple[str, PurePosixPath, bytes]] = []
        for name, content in image_files(path):
            if len(name.parts) != 2:
                raise UsageError(
                    f"{path} has the image {name}, which is not <class>/<name>; "
                    "a labelled set has one folder per class and the images right inside it."
                )
            files.append((name.parts[0], name, content))
        classes = tuple(sorted({label for label, _, _ in files}))
        if classes == ("images", "masks"):
            raise UsageError(
                f"{path} has images/ and masks/, which is a dense set and not two classes; set the kind "
                "to dense."
            )
        index = {label: i for i, label in enumerate(classes)}
        images = decode(path, [(name, content) for _, name, content in files])
        labels = np.array([index[label] for label, _, _ in files], dtype=np.int64)
        return images, labels, classes

    def check(self, labels: Labels, images: Images, classes: Sequence[str], where: str) -> Labels:
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
            raise UsageError(
                f"'labels' in {where} is {labels.dtype} {list(labels.shape)}; "
                f"it must be integers [{len(images)}], one for each image."
            )
        indices = labels.astype(np.int64)
        if indices.min() < 0 or indices.max() >= len(classes):
            raise UsageError(
                f"'labels' in {where} runs from {indices.min()} to {indices.max()}; "
                f"with {len(classes)} classes it must run from 0 to {len(classes) - 1}."
            )
        return indices

    def check_learnable(self, labels: Labels, classes: Sequence[str], where: str) -> None:
        present = np.unique(labels)
        if len(present) < 2:
            raise UsageError(
                f"The probe set {where} has images of the class "
                f"{classes[int(present[0])]!r} only; give labelled images of two or more."
            )

    def renumbered(self, labels: Labels, order: NDArray[np.int64], classes: int) -> Labels:
        return np.asarray(order[labels])

    def targets(self, labels: Labels, classes: int) -> NDArray[np.float32]:
        return np.asarray(np.eye(classes, dtype=np.float32)[labels])

    def groups(self, labels: Labels) -> NDArray[np.int64]:
        return np.asarray(labels, np.int64)

    def examples(self, labels: Labels, classes: Sequence[str], most: int) -> list[tuple[int, str]]:
        present = np.unique(labels)[:most]
        return [(int(np.flatnonzero(labels == c)[0]), classes[int(c)]) for c in present]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels.to(logits.device))

    def teach(self, teaching: Teaching) -> Taught:
        """A linear classifier of the concatenated pooled features."""
        probe, transfer = pooled_of(teaching)
        labels = np.asarray(teaching.labels, np.int64)
        fit = teaching.fit
        head = fit_task_head(
            probe[teaching.own], labels, teaching.classes, transfer, fit.folds, fit.seed, fit.like
        )
        # One after the other: the product of a longer matrix may round a row otherwise.
        soft = torch.cat([head.probabilities(x, teaching.temperature) for x in (transfer, probe)])
        mine = F.one_hot(torch.from_numpy(labels), teaching.classes).float()
        return Taught(with_labels(soft, len(transfer), teaching.own, mine), head.cv_score, head)

    def soft_loss(self, head: nn.Module, features: Features, soft: Tensor, moved: Moved) -> Tensor:
        logits = self.logits(head, features)
        return F.cross_entropy(logits, soft.to(logits.device))

    def refit(
        self, head: nn.Module, own: Features, labels: Labels, many: Features, fit: Fit
    ) -> None:
        assert isinstance(head, nn.Linear)
        classes = head.out_features
        truth = np.asarray(labels, np.int64)
        fit_task_head(own.pooled, truth, classes, many.pooled, fit.folds, fit.seed).write_to(head)

    def kept(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        return np.asarray(logits.argmax(1))

    def measure(self, kept: NDArray[Any], labels: Labels) -> Mapping[str, float]:
        """accuracy: the share of images whose largest logit is at their label."""
        return {"accuracy": float((kept == labels).mean())}


def pooled_of(teaching: Teaching) -> tuple[Tensor, Tensor]:
    """The teachers' pooled features side by side, of the probe and of the transfer images."""
    probe = torch.cat([answers.pooled_probe for answers in teaching.answers], dim=1)
    transfer = torch.cat([answers.pooled_transfer for answers in teaching.answers], dim=1)
    return probe, transfer


def with_labels(soft: Tensor, transfer: int, own: slice, labels: Tensor) -> Tensor:
    """Targets [transfer + probe, …] with those of the task's own probe images taken from the labels."""
    soft[transfer + own.start : transfer + own.stop] = labels
    return soft


def _read_npz(path: Path) -> tuple[Images, Labels, tuple[str, ...]]:
    arrays = npz_arrays(path)
    images = npz_images(path, arrays)
    labels = arrays.get("labels")
    if labels is None:
        raise UsageError(f"{path} has no array called 'labels'; it must be integers [N].")
    if "classes" in arrays:
        return images, labels, tuple(str(name) for name in arrays["classes"].ravel())
    numbered = np.issubdtype(labels.dtype, np.integer) and labels.size
    highest = int(labels.astype(np.int64).max()) if numbered else 0
    return images, labels, tuple(str(i) for i in range(max(highest + 1, 1)))


KIND = SingleLabel()
