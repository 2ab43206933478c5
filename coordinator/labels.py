"""The probe sets of all tasks as one source of batches and losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coordinator.data import SeveralTasks
from coordinator.kinds import Features
from coordinator.loop import Drawn
from coordinator.student import Student


class Probes:
    """The tasks' labelled images; a step takes a batch of each task and sums their weighted losses."""

    def __init__(self, data: SeveralTasks) -> None:
        self._tasks = data.tasks
        self._images = {n: torch.from_numpy(t.probe.images) for n, t in data.tasks.items()}
        self._labels = {n: torch.from_numpy(t.probe.labels) for n, t in data.tasks.items()}

    @property
    def sizes(self) -> list[int]:
        """How many images each task has, in the order of the tasks."""
        return [len(images) for images in self._images.values()]

    def loss(self, student: Student, drawn: Sequence[Drawn]) -> Tensor:
        """sum_t v_t L_t, over a batch of each task.

        All batches go through the backbone together: batch norm then sees what it will see later.
        """
        images, labels = [], []
        for (name, task), some in zip(self._tasks.items(), drawn, strict=True):
            images.append(some.jitter.images(self._images[name][some.index]))
            labels.append(task.kind.moved(self._labels[name][some.index], some.jitter))
        if len(images) == 1:
            # Not cut out of a joint batch: a copy of the gradient may lie, and so round, otherwise.
            parts = [Features.of(student.feature_map(images[0]))]
        else:
            whole = Features.of(student.feature_map(torch.cat(images)))
            ends = torch.tensor([len(batch) for batch in images]).cumsum(0).tolist()
            parts = [
                whole.rows(slice(end - len(batch), end))
                for batch, end in zip(images, ends, strict=True)
            ]
        losses = [
            task.weight * task.kind.loss(task.kind.logits(student.head(name), features), truth)
            for (name, task), features, truth in zip(
                self._tasks.items(), parts, labels, strict=True
            )
        ]
        return torch.stack(losses).sum()
