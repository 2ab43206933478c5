"""The amalgamation task: what the student learns from the selected teachers, and how it is scored.

The task owns its loss, its trainable parts (the student and one translator per teacher and kind of
hint) and its checkpoint state; `aggregation` and `training` only run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coordinator.amalgamation.answers import TeacherAnswers
from coordinator.amalgamation.heads import TaskHead, fit_task_head
from coordinator.amalgamation.hints import map_hint, pooled_hint, standardise
from coordinator.amalgamation.translators import MapTranslator, PooledTranslator
from coordinator.augmentation import Jitter
from coordinator.config import AggregationConfig, HeadConfig
from coordinator.data import TaskData
from coordinator.optimisation import derived_seed
from coordinator.student import Student

State = Mapping[str, Tensor]


class Losses(msgspec.Struct, frozen=True):
    """The parts of one step's loss, each before its weight; None where it is switched off."""

    total: float
    hint_maps: float | None = None
    hint_pooled: float | None = None
    soft_targets: float | None = None


class AmalgamationTask:
    """The student learns, over the transfer and the probe images,

        hint_maps * sum_i w_i L_i(maps) + hint_pooled * sum_i w_i L_i(pooled)
        + soft_targets * cross-entropy with the task head's predictions

    with w_i the weights of the selection. The probe images come along with their labels for
    predictions: the few labels are the best targets there are.
    """

    def __init__(
        self,
        student: Student,
        data: TaskData,
        answers: Mapping[str, TeacherAnswers],
        weights: Mapping[str, float],
        saved: Mapping[str, State],
        config: AggregationConfig,
        head: HeadConfig,
        seed: int,
    ) -> None:
        """`answers` has those of the selected teachers, which are the keys of `weights`; `saved`
        the states of nets trained earlier, by the names that `nets` gives them.
        """
        self.student = student
        self.config = config
        self.weights = dict(sorted(weights.items()))
        self.images = torch.from_numpy(np.concatenate([data.transfer, data.probe.images]))
        self._transfer = len(data.transfer)
        self.head: TaskHead | None = None
        self.soft: Tensor | None = None
        if config.soft_targets:
            self.head, self.soft = _soft_targets(data, answers, self.weights, config, head, seed)
        self._pooled: dict[str, Tensor] = {}
        self._maps: dict[str, Tensor] = {}
        self._translators: dict[str, nn.Module] = {}
        for name in self.weights:
            if config.hint_pooled:
                target = self._pooled[name] = _standard_pooled(answers[name])
                self._translate("pooled", name, PooledTranslator, target, saved, seed)
            maps = answers[name].maps_transfer
            if config.hint_maps and maps is not None:
                self._maps[name] = maps
                self._translate("maps", name, MapTranslator, maps, saved, seed)

    def _translate(
        self,
        kind: str,
        name: str,
        make: Callable[[int, int], nn.Module],
        target: Tensor,
        saved: Mapping[str, State],
        seed: int,
    ) -> None:
        """A translator for a teacher: as an earlier selection or run left it, or a new one."""
        key = f"{kind} {name}"
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(derived_seed(seed, key))
            made = make(self.student.features, target.shape[1])
        self._translators[key] = made.to(self.student.mean.device)
        if key in saved:
            self._translators[key].load_state_dict(saved[key])

    def __len__(self) -> int:
        """How many images there are to train on."""
        return len(self.images)

    def loss(
        self, student: Student, index: Tensor, jitter: Jitter, weights: Mapping[str, float]
    ) -> tuple[Tensor, Losses]:
        """The loss of `student` on the images `index` int64[N], jittered, and its parts.

        Teachers weigh as `weights` says; those not in it do not count.
        """
        features = student.feature_map(jitter.images(self.images[index]))
        pooled = features.mean((2, 3))
        total = features.new_zeros(())
        maps_part = pooled_part = soft_part = None
        if self._maps:
            maps_part = self._map_hints(features, index, jitter, weights)
            total = total + self.config.hint_maps * maps_part
        if self._pooled:
            pooled_part = self._pooled_hints(pooled, index, weights)
            total = total + self.config.hint_pooled * pooled_part
        if self.soft is not None:
            soft_part = F.cross_entropy(student.head(pooled), self.soft[index].to(pooled.device))
            total = total + self.config.soft_targets * soft_part
        return total, Losses(
            float(total.detach()), *map(_value, (maps_part, pooled_part, soft_part))
        )

    def nets(self) -> dict[str, nn.Module]:
        """The trainable parts by name; their states are the task's checkpoint."""
        return {"student": self.student, **self._translators}

    def translators(self, teachers: Iterable[str]) -> dict[str, nn.Module]:
        """The translators of some teachers, by the names that `nets` gives them."""
        keys = (f"{kind} {name}" for name in teachers for kind in ("pooled", "maps"))
        return {key: self._translators[key] for key in keys if key in self._translators}

    def _pooled_hints(self, pooled: Tensor, index: Tensor, weights: Mapping[str, float]) -> Tensor:
        hints = []
        for name, weight in weights.items():
            target = self._pooled[name][index].to(pooled.device)
            translator = self._translators[f"pooled {name}"]
            hints.append(weight * pooled_hint(translator, pooled, target))
        return torch.stack(hints).sum()

    def _map_hints(
        self, features: Tensor, index: Tensor, jitter: Jitter, weights: Mapping[str, float]
    ) -> Tensor:
        """Over the transfer images only: maps of the probe images were never asked for."""
        rows = torch.nonzero(index < self._transfer).flatten()
        if not len(rows):
            return features.new_zeros(())
        height, width = self.images.shape[1:3]
        moved = jitter.rows(rows)
        hints = [
            weight
            * map_hint(
                self._translators[f"maps {name}"],
                features[rows.to(features.device)],
                moved.maps(self._maps[name][index[rows]].float(), height, width).to(
                    features.device
                ),
            )
            for name, weight in weights.items()
        ]
        return torch.stack(hints).sum()


def _soft_targets(
    data: TaskData,
    answers: Mapping[str, TeacherAnswers],
    selected: Iterable[str],
    config: AggregationConfig,
    head_config: HeadConfig,
    seed: int,
) -> tuple[TaskHead, Tensor]:
    """The task head, and the targets [transfer + probe, classes] that it and the labels give."""
    probe = torch.cat([answers[name].pooled_probe for name in selected], dim=1)
    transfer = torch.cat([answers[name].pooled_transfer for name in selected], dim=1)
    classes = len(data.probe.classes)
    head = fit_task_head(probe, data.probe.labels, classes, transfer, head_config.folds, seed)
    labels = F.one_hot(torch.from_numpy(data.probe.labels), classes).float()
    return head, torch.cat([head.probabilities(transfer, config.temperature), labels])


def _standard_pooled(answers: TeacherAnswers) -> Tensor:
    """Pooled features of the transfer, then the probe images, standardised over the former."""
    mean, deviation = standardise(answers.pooled_transfer)
    return (torch.cat([answers.pooled_transfer, answers.pooled_probe]) - mean) / deviation


def _value(part: Tensor | None) -> float | None:
    return None if part is None else float(part.detach())
