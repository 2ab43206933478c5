"""Any number of classes for every image: a sigmoid each, measured by mean average precision.

On disk an .npz with `images`, `labels` (uint8 [N, classes], 1 where the class is there) and `classes`; or
a folder, or a tar of one, with images at any depth and `labels.csv`: a line `file,class;class` for every
image, nothing after the comma for an image of none.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from coordinator.amalgamation.heads import TaskHead, fit_linear, stratified_folds
from coordinator.image_files import Images, decode, files_and_texts, npz_arrays, npz_images
from coordinator.kinds.kind import Features, Fit, Labels, Moved, Taught, Teaching
from coordinator.kinds.pooled import OnPooledFeatures
from coordinator.kinds.single_label import pooled_of, with_labels
from edge_teacher.contract.decisions import Decision
from edge_teacher.contract.errors import UsageError

_TABLE = "labels.csv"


class MultiLabel(OnPooledFeatures):
    """labels uint8[N, classes], 1 for every class that is there."""

    name = "multi-label"
    metrics: tuple[str, ...] = ("mean_average_precision", "f1")
    decision: Decision = "each"
    wants_maps = False
    dimensions = 2

    def read(self, path: Path) -> tuple[Images, Labels, tuple[str, ...]]:
        return _read_npz(path) if path.suffix == ".npz" else _read_table(path)

    def check(self, labels: Labels, images: Images, classes: Sequence[str], where: str) -> Labels:
        wanted = (len(images), len(classes))
        integers = np.issubdtype(labels.dtype, np.integer) or labels.dtype == np.bool_
        if not integers or labels.shape != wanted:
            raise UsageError(
                f"'labels' in {where} is {labels.dtype} {list(labels.shape)}; it must be uint8 "
                f"{list(wanted)}, a row for each image and a column for each class."
            )
        odd = np.setdiff1d(labels, [0, 1])
        if len(odd):
            raise UsageError(
                f"'labels' in {where} has the value {odd[0]}; it must be 1 where the class is in the "
                "image and 0 where it is not."
            )
        return labels.astype(np.uint8)

    def check_learnable(self, labels: Labels, classes: Sequence[str], where: str) -> None:
        share = np.asarray(labels, np.float64).mean(0)
        dull = [name for name, s in zip(classes, share, strict=True) if s in (0, 1)]
        if dull:
            raise UsageError(
                f"In the probe set {where} the class {dull[0]!r} is in all images or in none; give "
                "images with it and without it, or leave the class out."
            )

    def renumbered(self, labels: Labels, order: NDArray[np.int64], classes: int) -> Labels:
        found = np.zeros((len(labels), classes), np.uint8)
        found[:, order] = labels
        return found

    def targets(self, labels: Labels, classes: int) -> NDArray[np.float32]:
        return np.asarray(labels, np.float32)

    def groups(self, labels: Labels) -> NDArray[np.int64]:
        """The rarest class that an image shows; -1 for one that shows none."""
        there = np.asarray(labels, np.uint8) > 0
        frequency = np.where(there, there.sum(0), len(there) + 1)
        return np.where(there.any(1), frequency.argmin(1), -1).astype(np.int64)

    def examples(self, labels: Labels, classes: Sequence[str], most: int) -> list[tuple[int, str]]:
        found: dict[int, str] = {}
        for column in np.asarray(labels).T:
            image = int(column.argmax())
            if column[image]:
                there = np.flatnonzero(np.asarray(labels)[image])
                found[image] = ", ".join(classes[int(i)] for i in there)
        return list(found.items())[:most]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.float().to(logits.device))

    def teach(self, teaching: Teaching) -> Taught:
        """One-vs-rest logistic regression on the concatenated pooled features."""
        probe, transfer = pooled_of(teaching)
        labels = np.asarray(teaching.labels, np.uint8)
        head = _fit(probe[teaching.own], labels, transfer, teaching.fit)
        logits = head.logits(torch.cat([transfer, probe]))
        soft = torch.sigmoid(logits / teaching.temperature).float()
        mine = torch.from_numpy(labels).float()
        return Taught(with_labels(soft, len(transfer), teaching.own, mine), head.cv_score, head)

    def soft_loss(self, head: nn.Module, features: Features, soft: Tensor, moved: Moved) -> Tensor:
        logits = self.logits(head, features)
        return F.binary_cross_entropy_with_logits(logits, soft.to(logits.device))

    def refit(
        self, head: nn.Module, own: Features, labels: Labels, many: Features, fit: Fit
    ) -> None:
        assert isinstance(head, nn.Linear)
        _fit(own.pooled, np.asarray(labels, np.uint8), many.pooled, fit).write_to(head)

    def kept(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        return logits

    def measure(self, kept: NDArray[Any], labels: Labels) -> Mapping[str, float]:
        """mean_average_precision: over the classes that are in an image. f1: each class called present
        where its probability is above one half, the mean over the same classes."""
        truth = np.asarray(labels, np.bool_)
        return {
            "mean_average_precision": mean_average_precision(kept, truth),
            "f1": _mean_f1(kept > 0, truth),
        }


def mean_average_precision(scores: NDArray[Any], truth: NDArray[np.bool_]) -> float:
    """The mean over classes of sum_n (R_n - R_(n-1)) P_n, n running over the distinct scores.

    scores and truth are [N, classes]; classes in no image are left out, and without any it is 0.
    """
    found = [
        average_precision(scores[:, c], truth[:, c])
        for c in range(truth.shape[1])
        if truth[:, c].any()
    ]
    return float(np.mean(found)) if found else 0.0


def average_precision(scores: NDArray[Any], truth: NDArray[np.bool_]) -> float:
    """Of one class, [N] each, of which at least one is true. Images of equal score count together."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    last_of_score = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    hits_there = hits[last_of_score]
    precision = hits_there / (last_of_score + 1)
    gained = np.diff(hits_there, prepend=0) / hits[-1]
    return float((gained * precision).sum())


def _mean_f1(guess: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    there = truth.any(0)
    right = (guess & truth).sum(0)
    f1 = 2 * right / np.maximum(guess.sum(0) + truth.sum(0), 1)
    return float(f1[there].mean()) if there.any() else 0.0


def _fit(features: Tensor, labels: NDArray[np.uint8], many: Tensor, fit: Fit) -> TaskHead:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        # Summed over the classes: each is a regression of its own, under the same penalty.
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()

    # So that rare classes are spread over the folds.
    part = stratified_folds(
        KIND.groups(labels), min(fit.folds, len(labels)), np.random.default_rng(fit.seed)
    )
    return fit_linear(
        features,
        torch.from_numpy(labels).double(),
        labels.shape[1],
        many,
        part,
        loss,
        lambda logits, truth: mean_average_precision(logits, np.asarray(truth, np.bool_)),
        fit.like,
    )


def _read_npz(path: Path) -> tuple[Images, Labels, tuple[str, ...]]:
    arrays = npz_arrays(path)
    images = npz_images(path, arrays)
    for name, what in (("labels", "uint8 [N, classes]"), ("classes", "the names of the classes")):
        if name not in arrays:
            raise UsageError(f"{path} has no array called {name!r}; it must be {what}.")
    return images, arrays["labels"], tuple(str(name) for name in arrays["classes"].ravel())


def _read_table(path: Path) -> tuple[Images, Labels, tuple[str, ...]]:
    files, texts = files_and_texts(path, (_TABLE,))
    if _TABLE not in texts:
        raise UsageError(
            f"{path} has no {_TABLE}; a multi-label set has one, with a line file,class;class for "
            "every image."
        )
    said: dict[str, set[str]] = {}
    for number, row in enumerate(csv.reader(texts[_TABLE].splitlines()), start=1):
        if not row or (number == 1 and row[0].strip() == "file"):
            continue
        if len(row) != 2 or row[0].strip() in said:
            problem = "names a file again" if len(row) == 2 else f"has {len(row)} columns"
            raise UsageError(
                f"Line {number} of {_TABLE} in {path} {problem}; every image has one line, file,class;class."
            )
        said[row[0].strip()] = {name.strip() for name in row[1].split(";") if name.strip()}
    names = [str(name) for name, _ in files]
    if odd := sorted(set(names) ^ set(said)):
        where = f"has no line in {_TABLE}" if odd[0] in names else f"is in {_TABLE} only"
        raise UsageError(
            f"{odd[0]} in {path} {where}; give every image one line, and every line an image."
        )
    classes = tuple(sorted(set().union(*said.values())))
    labels = np.array([[name in said[file] for name in classes] for file in names], np.uint8)
    return decode(path, files), labels.reshape(len(files), len(classes)), classes


KIND = MultiLabel()
