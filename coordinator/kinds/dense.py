"""A class for every pixel: a 1x1 convolution on the feature map, measured by mean IoU.

On disk an .npz with `images`, `labels` (integers [N, H, W], 255 where nobody knows) and `classes`; or a
folder, or a tar of one, with `images/` and `masks/` of the same names, the masks PNG with a palette or
grey, and optionally `classes.txt` with a name a line.
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

from coordinator.amalgamation.answers import TeacherAnswers
from coordinator.amalgamation.heads import TaskHead, fit_linear
from coordinator.amalgamation.hints import signed_root
from coordinator.augmentation import Jitter
from coordinator.image_files import (
    Images,
    decode,
    decode_masks,
    files_and_texts,
    npz_arrays,
    npz_images,
    size_of,
)
from coordinator.kinds.kind import Features, Fit, Labels, Moved, Taught, Teaching
from coordinator.kinds.single_label import with_labels
from edge_teacher.contract.decisions import Decision
from edge_teacher.contract.errors import UsageError

IGNORE = 255
"""The label of a pixel that counts nowhere."""
_NAMES = "classes.txt"
_MOST_CELLS = 6000
"""Cells a head is fitted to, of all images together: more add little, and the fit's time grows with them."""
_BATCH = 256


class DenseHead(nn.Module):
    """Feature map [N, C, h, w] -> logits [N, classes, *size], enlarged bilinearly."""

    def __init__(self, features: int, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.cells = nn.Conv2d(features, classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        return _resized(self.cells(features), self.size)


class Dense:
    """labels uint8[N, H, W], 255 for a pixel that counts nowhere."""

    name = "dense"
    metrics: tuple[str, ...] = ("mean_iou", "pixel_accuracy")
    decision: Decision = "top-1"
    wants_maps = True
    dimensions = 4

    def read(self, path: Path) -> tuple[Images, Labels, tuple[str, ...]]:
        return _read_npz(path) if path.suffix == ".npz" else _read_folder(path)

    def check(self, labels: Labels, images: Images, classes: Sequence[str], where: str) -> Labels:
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:3]:
            raise UsageError(
                f"'labels' in {where} is {labels.dtype} {list(labels.shape)}; it must be integers "
                f"{list(images.shape[:3])}, one for each pixel of each image."
            )
        if len(classes) > IGNORE:
            raise UsageError(
                f"{where} has {len(classes)} classes; a dense task may have {IGNORE}, since the label "
                f"{IGNORE} means that a pixel does not count."
            )
        counted = labels[labels != IGNORE].astype(np.int64)
        if counted.size and (counted.min() < 0 or counted.max() >= len(classes)):
            odd = counted.min() if counted.min() < 0 else counted.max()
            raise UsageError(
                f"'labels' in {where} has the value {odd}; with {len(classes)} classes it must run "
                f"from 0 to {len(classes) - 1}, or be {IGNORE} where a pixel does not count."
            )
        return labels.astype(np.uint8)

    def check_learnable(self, labels: Labels, classes: Sequence[str], where: str) -> None:
        present = np.setdiff1d(labels, [IGNORE])
        if len(present) < 2:
            only = (
                f"pixels of the class {classes[int(present[0])]!r} only"
                if len(present)
                else "no pixel that counts"
            )
            raise UsageError(
                f"The probe set {where} has {only}; give masks of two classes or more."
            )

    def renumbered(self, labels: Labels, order: NDArray[np.int64], classes: int) -> Labels:
        number = np.full(256, IGNORE, np.uint8)
        number[: len(order)] = order
        return np.asarray(number[np.asarray(labels, np.uint8)])

    def targets(self, labels: Labels, classes: int) -> NDArray[np.float32]:
        """The share of each class among the pixels that count: pooled features know no places."""
        shares = cell_shares(torch.from_numpy(np.asarray(labels, np.uint8)), classes, (1, 1))
        return np.asarray(shares[:, :, 0, 0].numpy())

    def groups(self, labels: Labels) -> NDArray[np.int64]:
        """The class that most pixels have."""
        counts = [
            np.bincount(mask[mask != IGNORE], minlength=1) for mask in np.asarray(labels, np.uint8)
        ]
        return np.array([count.argmax() for count in counts], np.int64)

    def examples(self, labels: Labels, classes: Sequence[str], most: int) -> list[tuple[int, str]]:
        truth = np.asarray(labels)
        found: dict[int, str] = {}
        for c in np.setdiff1d(truth, [IGNORE]):
            image = int((truth == c).sum((1, 2)).argmax())
            there = np.setdiff1d(truth[image], [IGNORE])
            found[image] = ", ".join(classes[int(i)] for i in there)
        return list(found.items())[:most]

    def head(self, features: int, classes: int, size: tuple[int, int]) -> nn.Module:
        return DenseHead(features, classes, size)

    def logits(self, head: nn.Module, features: Features) -> Tensor:
        logits: Tensor = head(features.map)
        return logits

    def tail(self, head: nn.Module) -> nn.Module:
        return head

    def target(self, logits: Tensor) -> Tensor:
        """The map of the class that is largest over all pixels, summed: as a dense teacher's `mean`."""
        return logits.sum((2, 3)).max(dim=1).values

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, the mean over the pixels that count; 0 where none does."""
        truth = labels.long().to(logits.device)
        total = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum")
        return total / (truth != IGNORE).sum().clamp_min(1)

    def moved(self, labels: Tensor, jitter: Jitter) -> Tensor:
        return jitter.images(labels[..., None])[..., 0]

    def teach(self, teaching: Teaching) -> Taught:
        """Logistic regression on the cells of the teachers' feature maps, brought to the largest's size.

        A cell's label is that of most of its pixels. The targets [images, classes, h, w] are of that size.
        """
        maps = [_maps_of(answers) for answers in teaching.answers]
        transfer = len(maps[0][0])
        size = (max(t.shape[2] for t, _ in maps), max(t.shape[3] for t, _ in maps))
        own = range(transfer + teaching.own.start, transfer + teaching.own.stop)

        def sight(rows: Tensor) -> Tensor:
            """[rows, C, *size] of all teachers; transfer images first, then the probe's."""
            parts = []
            for of_transfer, of_probe in maps:
                seen = torch.cat(
                    [
                        of_transfer[rows[rows < transfer]],
                        of_probe[rows[rows >= transfer] - transfer],
                    ]
                )
                parts.append(_resized(signed_root(seen.float()), size))
            return torch.cat(parts, dim=1)

        labels = torch.from_numpy(np.asarray(teaching.labels, np.uint8))
        shares = cell_shares(labels, teaching.classes, size)
        many = _some_rows(transfer, size)
        head = _fit(sight(torch.tensor(own)), shares, sight(many), teaching.fit)
        soft = []
        for rows in torch.split(torch.arange(transfer + len(maps[0][1])), _BATCH):
            cells = _as_rows(sight(rows))
            found = head.probabilities(cells, teaching.temperature)
            soft.append(found.view(len(rows), *size, -1).permute(0, 3, 1, 2).half())
        every = torch.cat(soft)
        return Taught(
            with_labels(every, transfer, teaching.own, shares.half()), head.cv_score, head
        )

    def soft_loss(self, head: nn.Module, features: Features, soft: Tensor, moved: Moved) -> Tensor:
        """Cross-entropy by cell, at the targets' size; a cell without a target counts nothing."""
        assert isinstance(head, DenseHead)
        targets = moved.jitter.maps(soft.float(), moved.height, moved.width)
        logits = _resized(head.cells(features.map), (soft.shape[2], soft.shape[3]))
        targets = targets.to(logits.device)
        return -(targets * F.log_softmax(logits, 1)).sum(1).mean()

    def refit(
        self, head: nn.Module, own: Features, labels: Labels, many: Features, fit: Fit
    ) -> None:
        assert isinstance(head, DenseHead)
        size = (own.map.shape[2], own.map.shape[3])
        truth = torch.from_numpy(np.asarray(labels, np.uint8))
        shares = cell_shares(truth, head.cells.out_channels, size)
        some = many.map[_some_rows(len(many.map), size)]
        _fit(own.map, shares, some, fit).write_to(head.cells)

    def kept(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        return np.asarray(logits.argmax(1), np.uint8)

    def measure(self, kept: NDArray[Any], labels: Labels) -> Mapping[str, float]:
        """mean_iou: over the classes that are in the labels or in the answers. pixel_accuracy: the share
        of right pixels. Both over the pixels that count."""
        counts = labels != IGNORE
        return {
            "mean_iou": mean_iou(kept[counts], np.asarray(labels)[counts]),
            "pixel_accuracy": float((kept == labels)[counts].mean()) if counts.any() else 0.0,
        }


def mean_iou(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    """Intersection over union of each class that is in either, [N] each, averaged; 0 without a pixel."""
    found = []
    for c in np.union1d(guess, truth):
        a, b = guess == c, truth == c
        found.append((a & b).sum() / (a | b).sum())
    return float(np.mean(found)) if found else 0.0


def cell_shares(labels: Tensor, classes: int, size: tuple[int, int]) -> Tensor:
    """Labels uint8[N, H, W] -> the share of each class in each cell, float32[N, classes, *size].

    Of the pixels that count; where none does, all shares are 0.
    """
    one_hot = [F.adaptive_avg_pool2d((labels == c).float()[:, None], size) for c in range(classes)]
    shares = torch.cat(one_hot, dim=1)
    return shares / shares.sum(1, keepdim=True).clamp_min(1e-12)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _as_rows(maps: Tensor) -> Tensor:
    """[N, C, h, w] -> [N * h * w, C]."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _maps_of(answers: TeacherAnswers) -> tuple[Tensor, Tensor]:
    if answers.maps_transfer is None or answers.maps_probe is None:
        raise ValueError("a dense task is taught by feature maps, and they were not asked for")
    return answers.maps_transfer, answers.maps_probe


def _some_rows(images: int, size: tuple[int, int]) -> Tensor:
    """So many images, evenly spread, that their cells are about as many as a head is fitted to."""
    count = max(1, min(images, _MOST_CELLS // (size[0] * size[1])))
    return torch.linspace(0, images - 1, count).long()


def _fit(maps: Tensor, shares: Tensor, many: Tensor, fit: Fit) -> TaskHead:
    """maps [P, C, h, w] with the classes' shares of their cells; many [M, C, h, w]."""
    label = _as_rows(shares).argmax(1)
    counts = torch.nonzero(_as_rows(shares).sum(1) > 0).flatten()
    rng = np.random.default_rng(fit.seed)
    if len(counts) > _MOST_CELLS:
        counts = counts[torch.from_numpy(np.sort(rng.permutation(len(counts))[:_MOST_CELLS]))]
    image = counts.numpy() // (maps.shape[2] * maps.shape[3])
    # Neighbouring cells are much alike: whole images are held out, not cells.
    fold = rng.permutation(len(maps)) % min(fit.folds, len(maps))
    return fit_linear(
        _as_rows(maps)[counts],
        label[counts],
        shares.shape[1],
        _as_rows(many),
        fold[image],
        F.cross_entropy,
        lambda logits, truth: mean_iou(logits.argmax(1), truth),
        fit.like,
    )


def _read_npz(path: Path) -> tuple[Images, Labels, tuple[str, ...]]:
    arrays = npz_arrays(path)
    images = npz_images(path, arrays)
    for name, what in (("labels", "integers [N, H, W]"), ("classes", "the names of the classes")):
        if name not in arrays:
            raise UsageError(f"{path} has no array called {name!r}; it must be {what}.")
    return images, arrays["labels"], tuple(str(name) for name in arrays["classes"].ravel())


def _read_folder(path: Path) -> tuple[Images, Labels, tuple[str, ...]]:
    files, texts = files_and_texts(path, (_NAMES,))
    images, masks = (_by_name(path, files, folder) for folder in ("images", "masks"))
    if not images or not masks:
        raise UsageError(
            f"{path} has {len(images)} images in images/ and {len(masks)} masks in masks/; a dense set "
            "has both, under the same names."
        )
    if odd := sorted(set(images) ^ set(masks)):
        which = "images/ only" if odd[0] in images else "masks/ only"
        raise UsageError(
            f"{odd[0]} in {path} is in {which}; give every image its mask of the same name."
        )
    order = sorted(images, key=lambda name: name.parts)
    pixels = decode(path, [images[name] for name in order])
    labels = decode_masks(path, [masks[name] for name in order])
    if labels.shape != pixels.shape[:3]:
        raise UsageError(
            f"The masks in {path} have {size_of(labels)} pixels and the images {size_of(pixels)}; "
            "bring them to one size."
        )
    counted = labels[labels != IGNORE]
    highest = int(counted.max()) if counted.size else 0
    if _NAMES in texts:
        return (
            pixels,
            labels,
            tuple(line.strip() for line in texts[_NAMES].splitlines() if line.strip()),
        )
    return pixels, labels, tuple(str(i) for i in range(highest + 1))


def _by_name(
    path: Path, files: Sequence[tuple[PurePosixPath, bytes]], folder: str
) -> dict[PurePosixPath, tuple[PurePosixPath, bytes]]:
    """The files in a folder by their names without the ending."""
    found: dict[PurePosixPath, tuple[PurePosixPath, bytes]] = {}
    for name, content in files:
        if name.parts[0] != folder:
            continue
        bare = name.relative_to(folder).with_suffix("")
        if bare in found:
            raise UsageError(
                f"{path} has {found[bare][0]} and {name}, which only their endings tell apart; rename one."
            )
        found[bare] = name, content
    return found


KIND = Dense()
