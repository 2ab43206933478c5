"""The teachers of the paper's table: eight alike, each trained on its own 20 Tiny-ImageNet classes.

    python -m benchmarks.paper_teachers --data FOLDER [--only 0 2 4 6]

They have the student's own architecture, so that their weights can be fine-tuned for the row that the
paper calls transfer. One thread each: run two of these side by side on two cores. A finished teacher is
not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.paper_data import Split, archives, split
from coordinator.augmentation import Jitter
from coordinator.data import LabelledImages
from coordinator.optimisation import (
    Descent,
    OneCycle,
    shuffled_batches,
    stage_generator,
    steps_per_epoch,
)
from coordinator.student import Student, StudentSpec, accuracy, save_student

COUNT = 8
CLASSES_EACH = 20
CHANNELS = 24
EPOCHS = 15
BATCH = 64
SEED = 13309


def path_of(index: int, work: Path) -> Path:
    return work / "teachers" / f"{index}.pt"


def fit_labels(
    net: Student,
    labelled: LabelledImages,
    stage: str,
    seed: int,
    *,
    epochs: int,
    rate: float,
    after_epoch: Callable[[int], None] = lambda _epoch: None,
) -> None:
    """Cross-entropy on the labels, as a run's own baseline has it."""
    images, labels = torch.from_numpy(labelled.images), torch.from_numpy(labelled.labels)
    generator = stage_generator(seed, stage)
    steps = epochs * steps_per_epoch(len(labelled), BATCH)
    descent = Descent([net], OneCycle(rate, steps), 5e-4)
    for epoch in range(1, epochs + 1):
        net.train()
        for index in shuffled_batches(len(labelled), BATCH, generator):
            jitter = Jitter.draw(len(index), 4, generator)
            descent.step(F.cross_entropy(net(jitter.images(images[index])), labels[index]))
        after_epoch(epoch)


def train_teacher(index: int, train: Split, val: Split, work: Path) -> None:
    """Train teacher `index` on its group of classes and write it, unless it is there."""
    path = path_of(index, work)
    if path.exists():
        return
    names = train.classes[CLASSES_EACH * index : CLASSES_EACH * (index + 1)]
    own, held_out = train.of(names), val.of(names)
    torch.manual_seed(SEED + index)
    net = Student(StudentSpec.of_images(own.images, names, CHANNELS))
    reached = [0.0]
    started = time.monotonic()

    def say(epoch: int) -> None:
        reached.append(accuracy(net, held_out.images, held_out.labels))
        spent = time.monotonic() - started
        print(
            f"teacher {index} epoch {epoch}/{EPOCHS}: {reached[-1]:.3f}, {spent:.0f} s", flush=True
        )

    fit_labels(net, own, "teacher", SEED + index, epochs=EPOCHS, rate=0.1, after_epoch=say)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "classes": names,
        "accuracy": round(reached[-1], 4),
        "epochs": EPOCHS,
        "seed": SEED + index,
    }
    path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    save_student(net.eval(), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/paper"))
    parser.add_argument("--only", type=int, nargs="*", default=list(range(COUNT)), metavar="I")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _, tiny = archives(options.data)
    train, val = (split(tiny, name, options.work) for name in ("train", "val"))
    for index in options.only:
        train_teacher(index, train, val, options.work)


if __name__ == "__main__":
    main()
