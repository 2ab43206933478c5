"""The images of the paper's table: CIFAR-10 as the target, Tiny-ImageNet groups for the teachers.

Both are archives of JPEG files that are not part of this repository (`--data` names their folder); they
are unpacked once into arrays in the work folder. CIFAR-10 tasks are all its classes or some of them.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordinator.data import LabelledImages, TaskData
from edge_teacher.contract.errors import UsageError

CIFAR = "cifar10.tar.xz"
TINY = "tiny_imagenet32_160.tar.xz"

TASKS: dict[str, tuple[str, ...]] = {
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar10-animals": ("bird", "cat", "deer", "dog", "frog", "horse"),
    "cifar10-vehicles": ("airplane", "automobile", "ship", "truck"),
    # Named nowhere else: no score was chosen by looking at these.
    "cifar10-pets": ("cat", "dog", "horse"),
    "cifar10-sky": ("airplane", "bird", "ship"),
    "cifar10-wild": ("bird", "deer", "frog"),
    "cifar10-road": ("automobile", "truck", "cat", "dog"),
    "cifar10-mixed": ("airplane", "cat", "frog", "horse", "truck"),
}


@dataclass(frozen=True)
class Split:
    """images uint8[N, 32, 32, 3], labels int64[N] into `classes`, in the order of the files."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def of(self, names: tuple[str, ...]) -> LabelledImages:
        """The images of some classes, numbered in the order of `names`."""
        number = {self.classes.index(name): i for i, name in enumerate(names)}
        rows = np.flatnonzero(np.isin(self.labels, list(number)))
        labels = np.array([number[int(label)] for label in self.labels[rows]], np.int64)
        return LabelledImages(self.images[rows], labels, names)


def archives(folder: Path) -> tuple[Path, Path]:
    """(CIFAR-10, Tiny-ImageNet) in `folder`. Raises UsageError if one is missing."""
    found = folder / CIFAR, folder / TINY
    for path in found:
        if not path.is_file():
            raise UsageError(
                f"{path} is missing; the table needs {CIFAR} and {TINY} in one folder: name it with --data"
            )
    return found


def split(archive: Path, name: str, work: Path) -> Split:
    """One split (`train`, `val`, `test`) of an archive, kept as arrays in `work`."""
    kept = work / f"{archive.name.split('.')[0]}-{name}.npz"
    if not kept.exists():
        images, labels, classes = _read(archive, name)
        work.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"partial-{kept.name}")
        np.savez(partial, images=images, labels=labels, classes=np.array(classes))
        partial.rename(kept)
    with np.load(kept, allow_pickle=False) as arrays:
        return Split(arrays["images"], arrays["labels"], tuple(map(str, arrays["classes"])))


def _read(archive: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    files: dict[tuple[str, str], NDArray[np.uint8]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) != 3 or parts[0] != name:
                continue
            file = tar.extractfile(member)
            if file is not None:
                files[parts[1], parts[2]] = np.asarray(
                    Image.open(io.BytesIO(file.read())).convert("RGB")
                )
    classes = sorted({label for label, _ in files})
    order = sorted(files)
    labels = np.array([classes.index(label) for label, _ in order], np.int64)
    return np.stack([files[key] for key in order]), labels, classes


def cifar_task(
    train: Split,
    test: Split,
    task: str,
    *,
    per_class: int,
    transfer: int,
    seed: int,
) -> TaskData:
    """`per_class` labelled images of each class, `transfer` others without labels, the whole test set.

    The unlabelled images are of the task's own classes. Drawn by `seed`; the same seed gives the same
    images whatever the method.
    """
    names = TASKS[task]
    pool = train.of(names)
    rng = np.random.default_rng([seed, len(names)])
    order = rng.permutation(len(pool))
    probe = np.concatenate(
        [order[pool.labels[order] == label][:per_class] for label in range(len(names))]
    )
    rest = order[~np.isin(order, probe)][:transfer]
    return TaskData(
        LabelledImages(pool.images[probe], pool.labels[probe], names),
        pool.images[rest],
        test.of(names),
    )
