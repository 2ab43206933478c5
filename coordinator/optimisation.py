"""One way of descending, used by every stage: SGD with momentum under one learning-rate cycle."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_RISE = 0.2
_MOMENTUM = 0.9


@dataclass(frozen=True)
class OneCycle:
    """The rate rises linearly to `peak` over the first fifth of `steps`, then falls as a cosine.

    Smith and Topin, 2018. A function of the step alone, so that a resumed run goes on exactly.
    """

    peak: float
    steps: int

    def rate(self, step: int) -> float:
        position = (step + 1) / (self.steps + 1)
        if position < _RISE:
            return self.peak * position / _RISE
        return self.peak * (1 + math.cos(math.pi * (position - _RISE) / (1 - _RISE))) / 2


class Descent:
    """Steps from `start` on along a cycle, for all weights of `modules`."""

    def __init__(
        self, modules: Sequence[nn.Module], cycle: OneCycle, weight_decay: float, start: int = 0
    ) -> None:
        self._cycle = cycle
        self._step = start
        parameters = [p for module in modules for p in module.parameters()]
        self._sgd = torch.optim.SGD(
            parameters, lr=0.0, momentum=_MOMENTUM, nesterov=True, weight_decay=weight_decay
        )

    @property
    def rate(self) -> float:
        """Of the step that was done last."""
        return self._cycle.rate(self._step - 1)

    def step(self, loss: Tensor) -> None:
        for group in self._sgd.param_groups:
            group["lr"] = self._cycle.rate(self._step)
        self._sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._sgd.step()
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """The momentum; where in the cycle it is, its `start` says."""
        state: dict[str, Any] = self._sgd.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sgd.load_state_dict(state)


def steps_per_epoch(images: int, batch: int) -> int:
    return max(images // batch, 1)


def shuffled_batches(images: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches int64[batch] of one epoch; what is left over is not used in this one.

    Batch norm would take its statistics from too few images in a short last batch. A set smaller
    than one batch is one batch.
    """
    order = torch.randperm(images, generator=generator)
    size = min(batch, images)
    for start in range(0, steps_per_epoch(images, batch) * size, size):
        yield order[start : start + size]


def joint_batches(
    sizes: Sequence[int], batch: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, ...]]:
    """One epoch over several sets at once: an index batch of each in every step.

    The set with most batches is gone through once, as `shuffled_batches` would; a smaller one is
    shuffled again whenever it is used up, so that every task has a batch in every step.
    """
    steps = joint_steps(sizes, batch)
    epochs = [
        [
            index
            for _ in range(-(-steps // steps_per_epoch(size, batch)))
            for index in shuffled_batches(size, batch, generator)
        ]
        for size in sizes
    ]
    yield from zip(*(batches[:steps] for batches in epochs), strict=True)


def joint_steps(sizes: Sequence[int], batch: int) -> int:
    """Steps in one epoch of `joint_batches`."""
    return max(steps_per_epoch(size, batch) for size in sizes)


def derived_seed(seed: int, what: str) -> int:
    """A seed of its own for every random choice, so that none depends on what was drawn before."""
    digest = hashlib.sha256(f"{seed} {what}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def stage_generator(seed: int, stage: str) -> torch.Generator:
    """The randomness of one stage: a function of its name, so that a resumed run repeats it."""
    return torch.Generator().manual_seed(derived_seed(seed, stage))
