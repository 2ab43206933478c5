"""Which weights a fine-tuning ends with: the last, an average, or the best by held-out labels.

Averaging: Izmailov et al., UAI 2018 ("Averaging weights leads to wider optima and better generalization"),
with torch.optim.swa_utils. Statistics of batch norm cannot be averaged, for they belong to the weights they
were gathered with: they are gathered again with the averaged ones.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from coordinator.adapted import Adapted
from coordinator.config import FinetuneConfig
from coordinator.data import LabelledTask, SeveralTasks
from coordinator.measures import first_metric, measured
from coordinator.optimisation import derived_seed
from coordinator.ranks import Ranks
from coordinator.report import metric_name
from coordinator.student import Student
from edge_teacher.contract.errors import UsageError

_STATISTICS_IMAGES = 2048
_BATCH = 256


class Adaptation:
    """Follows a fine-tuning of `student`; `finish` gives it the weights that are kept.

    Its state is in `nets`, for the checkpoint. All ranks must follow alike; the first one's scores count.
    """

    def __init__(
        self,
        student: Student,
        config: FinetuneConfig,
        images: Tensor,
        held: SeveralTasks | None,
        steps: int,
        ranks: Ranks,
    ) -> None:
        """`images` uint8[N, H, W, 3] are what batch norm's statistics are gathered from, `held` the
        labels to choose by, as test sets; `steps` there are in all.
        """
        self._student = student
        self._config = config
        self._held = held
        self._ranks = ranks
        self._first_averaged = steps - math.ceil(config.average * steps)
        self._images = images
        self._average = AveragedModel(student) if config.average else None
        self._statistics_are_right = False
        self._epochs = 0
        self._best = None if held is None else _Best(student, config.epochs)

    def nets(self, prefix: str) -> dict[str, nn.Module]:
        """By the names they are saved under, which begin with `prefix`."""
        there = {"average": self._average, "best": self._best}
        return {f"{prefix}{name}": net for name, net in there.items() if net is not None}

    def stepped(self, step: int) -> None:
        """Step `step`, counted from 1, is done."""
        if self._average is not None and step > self._first_averaged:
            self._average.update_parameters(self._student)
            self._statistics_are_right = False

    def ended(self, epoch: int) -> bool:
        """`epoch` epochs are done; 0 says that they begin. Whether it is to stop."""
        self._epochs = epoch
        if self._best is None:
            return False
        score = self._ranks.first_does(self._score)
        averaged = 0 if self._average is None else int(self._average.n_averaged)
        self._best.offer(epoch, score, self.current(), averaged)
        patience = self._config.patience
        return bool(patience) and epoch - self._best.at >= patience

    def current(self) -> Student:
        """What it would end with now, if the epoch were not chosen."""
        if self._average is None or not int(self._average.n_averaged):
            return self._student
        averaged = self._average.module
        assert isinstance(averaged, Student)
        if not self._statistics_are_right:
            self._gather_statistics(averaged)
            self._statistics_are_right = True
        return averaged

    def _gather_statistics(self, student: Student) -> None:
        count = len(self._images)
        rows = torch.linspace(0, count - 1, min(_STATISTICS_IMAGES, count)).long()
        # Evenly: every batch counts the same, and a short last one would be too much of it.
        parts = torch.tensor_split(rows, math.ceil(len(rows) / _BATCH))
        batches = (self._images[part] for part in parts)
        # Dropout runs while they are gathered, and draws.
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(derived_seed(0, "statistics"))
            update_bn(batches, _Backbone(student))

    def finish(self) -> Adapted | None:
        """Give the student the weights that are kept; what they are, if that is worth a word."""
        if self._average is None and self._best is None:
            return None
        averaged = 0 if self._average is None else int(self._average.n_averaged)
        if self._best is None:
            self._student.load_state_dict(self.current().state_dict())
            return Adapted(averaged=averaged, epoch=self._epochs, epochs=self._epochs)
        assert self._held is not None
        self._student.load_state_dict(self._best.student.state_dict())
        return Adapted(
            averaged=int(self._best.averaged),
            held_out=sum(len(t.test) for t in self._held.tasks.values() if t.test is not None),
            epoch=self._best.at,
            epochs=self._epochs,
            scores=tuple(self._best.scores[: self._epochs + 1].tolist()),
            metric=_metric(self._held),
        )

    def _score(self) -> float:
        assert self._held is not None
        return first_metric(measured(self.current(), self._held))


def _metric(data: SeveralTasks) -> str:
    """What `first_metric` gives, in words."""
    named = dict.fromkeys(metric_name(task.kind.metrics[0]) for task in data.tasks.values())
    tasks = len(data.tasks)
    return f"{f'the mean over {tasks} tasks of ' if tasks > 1 else ''}{' or '.join(named)}"


class _Best(nn.Module):
    """The best student so far, of which epoch, and everybody's score."""

    epoch: Tensor
    averaged: Tensor
    scores: Tensor

    def __init__(self, student: Student, epochs: int) -> None:
        super().__init__()
        self.student = copy.deepcopy(student)
        self.register_buffer("epoch", torch.tensor(-1))
        self.register_buffer("averaged", torch.tensor(0))
        self.register_buffer("scores", torch.full((epochs + 1,), -math.inf, dtype=torch.float64))

    @property
    def at(self) -> int:
        return int(self.epoch)

    def offer(self, epoch: int, score: float, student: Student, averaged: int) -> None:
        """Of equal ones the earlier stays: it has forgotten less of what the teachers taught."""
        if score > float(self.scores.max()):
            self.student.load_state_dict(student.state_dict())
            self.epoch.fill_(epoch)
            self.averaged.fill_(averaged)
        self.scores[epoch] = score


class _Backbone(nn.Module):
    """What of a student has statistics, whatever heads it has: uint8[N, H, W, 3] -> its feature map."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return self.student.feature_map(images)


def hold_out(
    data: SeveralTasks, share: float, seed: int
) -> tuple[SeveralTasks, SeveralTasks | None]:
    """(what is learnt from; the labels held out of it, as the test sets of their tasks).

    About `share` of every one of its kind's `groups` of each task's probe set, drawn by `seed`, and never all
    of one. With a single label a group is a class. With several labels to an image, or one to each pixel, an
    image is of one group only, and all images of another class it shows may be held out. None is held out
    for a share of 0. Raises UsageError if a task has no class with images enough.
    """
    if not share:
        return data, None
    learnt, held = {}, {}
    for name, task in data.tasks.items():
        rng = np.random.default_rng(derived_seed(seed, f"held out of {name}"))
        groups = task.kind.groups(task.probe.labels)
        out = np.zeros(len(groups), bool)
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            count = min(round(share * len(rows)), len(rows) - 1)
            out[rng.permutation(rows)[:count]] = True
        if not out.any():
            of_task = f" of {name}" if len(data.tasks) > 1 else ""
            raise UsageError(
                f"finetune.held_out is {share:g}, and no class in the probe set{of_task} has images enough "
                "to hold one out; give more labelled images, or set it to 0"
            )
        kept, apart = (
            replace(task.probe, images=task.probe.images[rows], labels=task.probe.labels[rows])
            for rows in (~out, out)
        )
        learnt[name] = LabelledTask(kept, task.test, task.weight)
        held[name] = LabelledTask(kept, apart, task.weight)
    return SeveralTasks(learnt, data.transfer), SeveralTasks(held, data.transfer)
