"""What a run must have before it begins: known at once, and not after an hour."""

from __future__ import annotations

from coordinator.config import Config
from coordinator.data import SeveralTasks
from coordinator.ranks import Ranks
from edge_teacher.contract.errors import UsageError


def require_enough(config: Config, teachers: int) -> None:
    """Known before the baseline and the warm-up, not after. Raises UsageError."""
    there = "is 1 teacher" if teachers == 1 else f"are {teachers} teachers"
    if config.selection.strategy != "all" and config.selection.k > teachers:
        raise UsageError(
            f"selection.k is {config.selection.k} and there {there}; "
            "start more of them or choose a smaller k."
        )
    if config.devices.least > teachers:
        raise UsageError(
            f"devices.least is {config.devices.least}, and there {there}; "
            "start more of them or choose a smaller number."
        )


def require_judgeable(config: Config, data: SeveralTasks) -> None:
    """The oracle judges sets by a classifier's accuracy on test images. Raises UsageError if it cannot."""
    if config.selection.strategy != "oracle":
        return
    for name, task in data.tasks.items():
        if task.probe.kind != "single-label":
            raise UsageError(
                f"The oracle judges by accuracy, and the task {name} is {task.probe.kind}; choose another "
                "selection.strategy."
            )
        if task.test is None:
            raise UsageError(
                f"The oracle judges by labelled test images, and the task {name} has none: give them "
                "(data.test), or choose another selection.strategy."
            )


def require_shares(config: Config, data: SeveralTasks, ranks: Ranks) -> None:
    """Every process needs two images of every step: batch norm has a variance. Raises UsageError."""
    if ranks.alone:
        return
    if config.batch % ranks.world or config.batch < 2 * ranks.world:
        raise UsageError(
            f"batch is {config.batch}, which {ranks.world} processes cannot share equally, two images "
            f"each at least; choose a multiple of {ranks.world} from {2 * ranks.world} on."
        )
    for name, task in data.tasks.items():
        if len(task.probe) < 2 * ranks.world:
            of_task = f" of {name}" if len(data.tasks) > 1 else ""
            raise UsageError(
                f"the probe set{of_task} has {len(task.probe)} images and {ranks.world} processes need "
                "two each; start fewer."
            )
