"""What a student reaches on the test sets of its tasks. Nothing is ever chosen by it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from coordinator.data import SeveralTasks
from coordinator.student import Student, measure


def measured(student: Student, data: SeveralTasks) -> dict[str, dict[str, float]]:
    """Every metric of every task that has a test set, by task and name."""
    return {
        name: measure(student, task.test, name)
        for name, task in data.tasks.items()
        if task.test is not None
    }


def first_metric(found: Mapping[str, Mapping[str, float]]) -> float:
    """The first metric of each task's kind, the mean over the tasks."""
    return float(np.mean([next(iter(metrics.values())) for metrics in found.values()]))
