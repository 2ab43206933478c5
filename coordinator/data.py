"""The user's data: one task, or several that one student learns at once.

How a labelled set is written down depends on the kind of the task (`coordinator.kinds`); unlabelled
images are at any depth of a folder or a tar archive, or in an .npz with `images`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordinator.config import Config, DataConfig
from coordinator.image_files import (
    Images,
    decode,
    decode_one,
    image_files,
    npz_arrays,
    npz_images,
    size_of,
)
from coordinator.kinds import Kind, kind_named
from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.topics import check_name

SINGLE = "task"
"""What the only task of a student is called where it has no name of its own."""


@dataclass(frozen=True)
class LabelledImages:
    """images uint8[N, H, W, 3]; labels as the kind has them; for `single-label` int64[N] into `classes`."""

    images: Images
    labels: NDArray[Any]
    classes: tuple[str, ...]
    kind: str = "single-label"

    def __len__(self) -> int:
        return len(self.images)

    def checked(self, where: str) -> LabelledImages:
        """The same with labels of the kind's own type. Raises UsageError for labels that are none."""
        kind = kind_named(self.kind)
        return replace(self, labels=kind.check(self.labels, self.images, self.classes, where))


def spread(labelled: LabelledImages, most: int) -> LabelledImages:
    """At most `most` of the images: as many of every class as there are, up to an equal share.

    An image of several classes counts as the one that its kind's `groups` say.
    """
    if len(labelled) <= most:
        return labelled
    groups = kind_named(labelled.kind).groups(labelled.labels)
    present, counts = np.unique(groups, return_counts=True)
    share = most // len(present)
    while np.minimum(counts, share + 1).sum() <= most:
        share += 1
    rows = [np.flatnonzero(groups == group)[: max(share, 1)] for group in present]
    chosen = np.sort(np.concatenate(rows))
    return replace(labelled, images=labelled.images[chosen], labels=labelled.labels[chosen])


@dataclass(frozen=True)
class TaskData:
    """The user's new task. All sets have images of one size, and `test` the classes of `probe`.

    `test` only measures what came out; nothing is ever chosen by it.
    """

    probe: LabelledImages
    transfer: Images
    test: LabelledImages | None = None


@dataclass(frozen=True)
class LabelledTask:
    """One of several tasks. `weight` is its share in every loss; 1 each is the plain sum."""

    probe: LabelledImages
    test: LabelledImages | None = None
    weight: float = 1.0

    @property
    def kind(self) -> Kind:
        return kind_named(self.probe.kind)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.probe.classes


@dataclass(frozen=True)
class SeveralTasks:
    """Tasks by name, in their order, and the unlabelled images that all of them share.

    Raises UsageError for no task, a name that is none, images of different sizes, labels that do not
    fit, a test set with other classes, or a weight that is not above 0 and finite.
    """

    tasks: Mapping[str, LabelledTask]
    transfer: Images

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UsageError("There is no task to learn; give at least one.")
        checked = {}
        for name, task in self.tasks.items():
            check_name(name)
            if not 0 < task.weight < math.inf:
                raise UsageError(
                    f"The weight of the task {name} is {task.weight}; it must be a finite number above 0."
                )
            probe = task.probe.checked(f"the probe set of {name}")
            require_size(
                probe.images, f"The probe set of {name}", self.transfer, "the transfer set"
            )
            test = task.test
            if test is not None:
                test = test.checked(f"the test set of {name}")
                require_size(
                    test.images, f"The test set of {name}", self.transfer, "the transfer set"
                )
                require_same_classes(test, f"of {name}", probe, f"of {name}")
            checked[name] = LabelledTask(probe, test, task.weight)
        object.__setattr__(self, "tasks", checked)

    @classmethod
    def of(
        cls, tasks: Mapping[str, TaskData], weights: Mapping[str, float] | None = None
    ) -> SeveralTasks:
        """Tasks that each have their data: the transfer sets are joined, one that several share once."""
        transfers: list[Images] = []
        for task in tasks.values():
            if not any(task.transfer is t or np.array_equal(task.transfer, t) for t in transfers):
                transfers.append(task.transfer)
        if not transfers:
            raise UsageError("There is no task to learn; give at least one.")
        for transfer in transfers[1:]:
            require_size(transfer, "A transfer set", transfers[0], "another")
        found = weights or {}
        labelled = {n: LabelledTask(t.probe, t.test, found.get(n, 1.0)) for n, t in tasks.items()}
        return cls(labelled, transfers[0] if len(transfers) == 1 else np.concatenate(transfers))

    @property
    def probe_images(self) -> Images:
        """Those of all tasks, one task after the other."""
        images = [task.probe.images for task in self.tasks.values()]
        return images[0] if len(images) == 1 else np.concatenate(images)

    def rows(self, name: str) -> slice:
        """Where a task's images are among the `probe_images`."""
        start = 0
        for other, task in self.tasks.items():
            if other == name:
                return slice(start, start + len(task.probe))
            start += len(task.probe)
        raise KeyError(name)


def as_several(data: TaskData | SeveralTasks) -> SeveralTasks:
    """One task is several of which there is one."""
    if isinstance(data, SeveralTasks):
        return data
    return SeveralTasks({SINGLE: LabelledTask(data.probe, data.test)}, data.transfer)


def read_task(
    probe: Path, transfer: Path, test: Path | None = None, kind: str = "single-label"
) -> TaskData:
    """Read the sets of one task and check that they belong together. Raises UsageError."""
    probe_set, test_set = _read_labelled_pair(probe, test, kind)
    transfer_images = read_unlabelled(transfer)
    require_size(transfer_images, str(transfer), probe_set.images, str(probe))
    return TaskData(probe_set, transfer_images, test_set)


def read_configured_task(config: DataConfig) -> TaskData:
    """`read_task` of the paths in a configuration, an empty one being no test set."""
    test = Path(config.test) if config.test else None
    return read_task(Path(config.probe), Path(config.transfer), test, config.kind)


def read_configured(config: Config) -> SeveralTasks:
    """The tasks that a configuration names, in `[tasks.NAME]` or the only one in `[data]`.

    Transfer sets are joined: that of `[data]` first, then each task's own; one named twice is read once.
    Raises UsageError.
    """
    if not config.tasks:
        return as_several(read_configured_task(config.data))
    tasks = {}
    for name, task in config.tasks.items():
        test = Path(task.test) if task.test else None
        tasks[name] = LabelledTask(
            *_read_labelled_pair(Path(task.probe), test, task.kind), task.weight
        )
    paths = dict.fromkeys([config.data.transfer, *(t.transfer for t in config.tasks.values())])
    named = [path for path in paths if path]
    transfers = [read_unlabelled(Path(path)) for path in named]
    for path, images in zip(named[1:], transfers[1:], strict=True):
        require_size(images, path, transfers[0], named[0])
    return SeveralTasks(tasks, transfers[0] if len(transfers) == 1 else np.concatenate(transfers))


def _read_labelled_pair(
    probe: Path, test: Path | None, kind: str
) -> tuple[LabelledImages, LabelledImages | None]:
    probe_set = read_labelled(probe, kind)
    kind_named(kind).check_learnable(probe_set.labels, probe_set.classes, str(probe))
    if test is None:
        return probe_set, None
    test_set = read_labelled(test, kind)
    require_size(test_set.images, str(test), probe_set.images, str(probe))
    require_same_classes(test_set, str(test), probe_set, str(probe))
    return probe_set, test_set


def read_labelled(path: Path, kind: str = "single-label") -> LabelledImages:
    """The labelled set at `path`. Raises UsageError, whose sentence says what is wrong with it."""
    images, labels, classes = kind_named(kind).read(path)
    return LabelledImages(images, labels, classes, kind).checked(str(path))


def read_unlabelled(path: Path) -> Images:
    """The images at `path`, at any depth, as uint8[N, H, W, 3]. Raises UsageError."""
    if path.suffix == ".npz":
        return npz_images(path, npz_arrays(path))
    return decode(path, image_files(path))


def read_photographs(path: Path, size: tuple[int, int], most: int) -> Images:
    """At most `most` of the images at `path`, evenly spread, each brought to `size` (H, W).

    Raises UsageError.
    """
    if path.suffix == ".npz":
        every = list(npz_images(path, npz_arrays(path)))
    else:
        files = image_files(path)
        chosen = np.linspace(0, len(files) - 1, min(most, len(files))).astype(int)
        every = [decode_one(path, *files[i]) for i in chosen]
    chosen = np.linspace(0, len(every) - 1, min(most, len(every))).astype(int)
    height, width = size
    pictures = [Image.fromarray(every[i]).resize((width, height)) for i in chosen]
    return np.stack([np.asarray(picture, np.uint8) for picture in pictures])


def require_size(images: Images, who: str, other: Images, whose: str) -> None:
    """Raises UsageError unless both have images of one size."""
    if images.shape[1:] != other.shape[1:]:
        raise UsageError(
            f"{who} has images of {size_of(images)} pixels and {whose} of {size_of(other)}; "
            "bring both to one size."
        )


def require_same_classes(
    test: LabelledImages, test_name: str, probe: LabelledImages, probe_name: str
) -> None:
    """Raises UsageError naming the classes that only one of them has."""
    if test.kind != probe.kind:
        raise UsageError(
            f"The test set {test_name} is {test.kind} and the probe set {probe.kind}; give both as one kind."
        )
    if test.classes != probe.classes:
        odd = sorted(set(test.classes) ^ set(probe.classes))
        raise UsageError(
            f"The test set {test_name} and the probe set {probe_name} have different classes: "
            f"{_said(odd)}; give both the same ones."
        )


def _said(odd: Sequence[str]) -> str:
    if not odd:
        return "the same ones in another order"
    return f"{', '.join(map(repr, odd[:5]))} in only one of them"
