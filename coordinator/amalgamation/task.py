"""The amalgamation task: what the student learns from the selected teachers, and how it is scored.

The task owns its loss, its trainable parts (the student and one translator per teacher and kind of
hint) and its checkpoint state; `aggregation` and `training` only run it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coordinator.amalgamation.answers import TeacherAnswers, ask
from coordinator.amalgamation.hints import map_hint, pooled_hint, standardise
from coordinator.amalgamation.translators import MapTranslator, PooledTranslator
from coordinator.amalgamation.uncertainty import Uncertainty, shares, weighed
from coordinator.augmentation import Jitter
from coordinator.checkpoints import TARGETS
from coordinator.config import AggregationConfig, HeadConfig
from coordinator.data import SeveralTasks
from coordinator.kinds import Features, Taught
from coordinator.kinds.kind import Fit, Moved, Teaching
from coordinator.optimisation import derived_seed
from coordinator.student import Student, features_of, pooled_features

State = Mapping[str, Tensor]


class Losses(msgspec.Struct, frozen=True):
    """The parts of one step's loss, each before its weight; None where it is switched off."""

    total: float
    hint_maps: float | None = None
    hint_pooled: float | None = None
    soft_targets: float | None = None


class SoftTargets(nn.Module):
    """A task's targets, [images, …]: state, for they change as the student does."""

    soft: Tensor

    def __init__(self, soft: Tensor) -> None:
        super().__init__()
        self.register_buffer("soft", soft)


@dataclass(frozen=True)
class OwnSight:
    """The student as one of those that are asked what they see."""

    student: Student
    name: str = "the student"

    def pooled(self, images: NDArray[np.uint8], *, mirrored: bool = False) -> NDArray[np.float32]:
        seen = np.ascontiguousarray(images[:, :, ::-1]) if mirrored else images
        found: NDArray[np.float32] = pooled_features(self.student, seen).numpy()
        return found

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = features_of(self.student, images).map.numpy()
        return found


class AmalgamationTask:
    """The student learns, over the transfer and the probe images,

        hint_maps * sum_i w_i L_i(maps) + hint_pooled * sum_i w_i L_i(pooled)
        + soft_targets * sum_t v_t (how far the head of task t is from the predictions for t)

    with v_t the weights of the tasks and w_i = sum_t v_t w_ti / sum_t v_t, w_ti being teacher i's
    weight in the selection for task t; where weights are learnt they begin as these (`uncertainty`).
    A task's probe images come along with their labels for predictions: the few labels are the best
    targets there are.
    """

    def __init__(
        self,
        student: Student,
        data: SeveralTasks,
        answers: Mapping[str, TeacherAnswers],
        selected: Mapping[str, Mapping[str, float]],
        saved: Mapping[str, State],
        config: AggregationConfig,
        head: HeadConfig,
        seed: int,
        agreement: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`selected` has for each task the weights of the teachers selected for it; `answers` has theirs,
        and `saved` the states of nets trained earlier, by the names that `nets` gives them. `targets` are
        then those names, by task; `unsaved` the tasks whose targets were not in `saved`.
        """
        self.student = student
        self.config = config
        self.weights = joint_weights(data, selected)
        self.images = torch.from_numpy(np.concatenate([data.transfer, data.probe_images]))
        self._agreement = agreement or {}
        self._transfer = len(data.transfer)
        self._shares = {name: task.weight for name, task in data.tasks.items()}
        self._fit = Fit(head.folds, seed)
        self._teach: dict[str, Callable[[Fit, Sequence[TeacherAnswers]], Taught]] = {}
        self.taught: dict[str, Taught] = {}
        self._targets: dict[str, SoftTargets] = {}
        self.targets: dict[str, str] = {}
        self.unsaved: list[str] = []
        if config.soft_targets:
            for name in data.tasks:
                told = [answers[teacher] for teacher in sorted(selected[name])]
                self._teach[name] = partial(_taught, data, name, told, config)
                self.taught[name] = self._teach[name](self._fit, [])
                # Of other teachers they are other targets: what is saved of those is of no use.
                key = f"{TARGETS}{name} by {', '.join(sorted(selected[name]))}"
                self.targets[name] = key
                self._targets[name] = SoftTargets(self.taught[name].soft)
                if key in saved:
                    self._targets[name].load_state_dict(saved[key])
                else:
                    self.unsaved.append(name)
        self._pooled: dict[str, Tensor] = {}
        self._maps: dict[str, Tensor] = {}
        self._translators: dict[str, nn.Module] = {}
        self._uncertainties: dict[str, dict[str, Uncertainty]] = {}
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
        if self.config.weights == "learnt":
            learnt = Uncertainty().to(self.student.mean.device)
            self._uncertainties.setdefault(kind, {})[name] = learnt
            if _weight_key(kind, name) in saved:
                learnt.load_state_dict(saved[_weight_key(kind, name)])

    def __len__(self) -> int:
        """How many images there are to train on."""
        return len(self.images)

    def loss(
        self, student: Student, index: Tensor, jitter: Jitter, weights: Mapping[str, float]
    ) -> tuple[Tensor, Losses]:
        """The loss of `student` on the images `index` int64[N], jittered, and its parts.

        Teachers weigh as `weights` says; those not in it do not count.
        """
        features = Features.of(student.feature_map(jitter.images(self.images[index])))
        total = features.map.new_zeros(())
        maps_part = pooled_part = soft_part = None
        if self._maps:
            maps_part = self._map_hints(features.map, index, jitter, weights)
            total = total + self.config.hint_maps * maps_part
        if self._pooled:
            pooled_part = self._pooled_hints(features.pooled, index, weights)
            total = total + self.config.hint_pooled * pooled_part
        if self._targets:
            soft_part = self._soft_losses(student, features, index, jitter)
            total = total + self.config.soft_targets * soft_part
        return total, Losses(
            float(total.detach()), *map(_value, (maps_part, pooled_part, soft_part))
        )

    def nets(self) -> dict[str, nn.Module]:
        """The trainable parts by name; their states are the task's checkpoint."""
        targets = {self.targets[name]: net for name, net in self._targets.items()}
        return {"student": self.student, **self.trained(self.weights), **targets}

    def refit(self, names: Collection[str] | None = None) -> None:
        """Fit the task heads again, on what the student itself sees beside what the teachers do.

        Those of all tasks, or of those named. By now it has learnt from thousands of images what no
        linear model on a few hundred can know, and that tells the classes besides what the teachers
        see: the next targets are better.
        """
        teach = {n: how for n, how in self._teach.items() if names is None or n in names}
        if not teach:
            return
        maps = any(self.student.kind(name).wants_maps for name in teach)
        own = ask(
            OwnSight(self.student),
            self.images[self._transfer :].numpy(),
            self.images[: self._transfer].numpy(),
            flips=self.config.flips,
            maps=maps,
            probe_maps=maps,
        )
        for name, how in teach.items():
            first = self.taught[name]
            again = how(replace(self._fit, like=first.head), [own])
            # The head chosen and its score stay the first's: the student has learnt the labels that
            # cross-validation would hold out.
            self.taught[name] = replace(first, soft=again.soft)
            self._targets[name].soft.copy_(again.soft)

    def trained(self, teachers: Iterable[str]) -> dict[str, nn.Module]:
        """What is learnt about some teachers besides the student, by the names that `nets` gives it:
        their translators, and what their hints weigh where that is learnt."""
        names = list(teachers)
        keys = (f"{kind} {name}" for name in names for kind in ("pooled", "maps"))
        translators = {key: self._translators[key] for key in keys if key in self._translators}
        weights = {
            _weight_key(kind, name): found[name]
            for kind, found in self._uncertainties.items()
            for name in names
        }
        return {**translators, **weights}

    def shares(self) -> Mapping[str, float]:
        """What each teacher's hints weigh now, of all kinds of hints together; they sum to 1."""
        if not self._uncertainties:
            return self.weights
        of_kind = {"pooled": self.config.hint_pooled, "maps": self.config.hint_maps}
        whole = sum(of_kind[kind] for kind in self._uncertainties)
        found = {kind: shares(self.weights, u) for kind, u in self._uncertainties.items()}
        return {
            name: sum(of_kind[kind] * each[name] for kind, each in found.items()) / whole
            for name in self.weights
        }

    def _soft_losses(
        self, student: Student, features: Features, index: Tensor, jitter: Jitter
    ) -> Tensor:
        height, width = self.images.shape[1:3]
        moved = Moved(jitter, height, width)
        losses = [
            self._shares[name]
            * student.kind(name).soft_loss(student.head(name), features, targets.soft[index], moved)
            for name, targets in self._targets.items()
        ]
        return torch.stack(losses).sum()

    def _pooled_hints(self, pooled: Tensor, index: Tensor, weights: Mapping[str, float]) -> Tensor:
        hints = {}
        for name in weights:
            target = self._pooled[name][index].to(pooled.device)
            translator = self._translators[f"pooled {name}"]
            hints[name] = pooled_hint(translator, pooled, target, self._each(name, index))
        return self._weighed("pooled", hints, weights)

    def _map_hints(
        self, features: Tensor, index: Tensor, jitter: Jitter, weights: Mapping[str, float]
    ) -> Tensor:
        """Over the transfer images only: maps of the probe images were never asked for."""
        rows = torch.nonzero(index < self._transfer).flatten()
        if not len(rows):
            return features.new_zeros(())
        height, width = self.images.shape[1:3]
        moved = jitter.rows(rows)
        hints = {
            name: map_hint(
                self._translators[f"maps {name}"],
                features[rows.to(features.device)],
                moved.maps(self._maps[name][index[rows]].float(), height, width).to(
                    features.device
                ),
                self._each(name, index[rows]),
            )
            for name in weights
        }
        return self._weighed("maps", hints, weights)

    def _each(self, teacher: str, index: Tensor) -> Tensor | None:
        found = self._agreement.get(teacher)
        return None if found is None else found[index]

    def _weighed(
        self, kind: str, hints: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> Tensor:
        if kind in self._uncertainties:
            return weighed(hints, weights, self._uncertainties[kind])
        return torch.stack([weights[name] * hint for name, hint in hints.items()]).sum()


def joint_weights(
    data: SeveralTasks, selected: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """w_i = sum_t v_t w_ti / sum_t v_t of every teacher that any task selected, by name."""
    whole = sum(task.weight for task in data.tasks.values())
    found: dict[str, float] = {}
    for name, task in data.tasks.items():
        for teacher, weight in selected[name].items():
            found[teacher] = found.get(teacher, 0.0) + task.weight * weight / whole
    return dict(sorted(found.items()))


def _taught(
    data: SeveralTasks,
    name: str,
    answers: Sequence[TeacherAnswers],
    config: AggregationConfig,
    fit: Fit,
    own: Sequence[TeacherAnswers],
) -> Taught:
    """What a head on the features of one task's own teachers, and on `own`, says about every image."""
    task = data.tasks[name]
    return task.kind.teach(
        Teaching(
            answers=[*answers, *own],
            own=data.rows(name),
            labels=task.probe.labels,
            classes=len(task.classes),
            temperature=config.temperature,
            fit=fit,
        )
    )


def _standard_pooled(answers: TeacherAnswers) -> Tensor:
    """Pooled features of the transfer, then the probe images, standardised over the former."""
    mean, deviation = standardise(answers.pooled_transfer)
    return (torch.cat([answers.pooled_transfer, answers.pooled_probe]) - mean) / deviation


def _weight_key(kind: str, teacher: str) -> str:
    return f"weight of {kind} {teacher}"


def _value(part: Tensor | None) -> float | None:
    return None if part is None else float(part.detach())
