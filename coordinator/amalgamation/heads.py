"""Task heads on the concatenated features of the selected teachers.

No teacher knows the new task, but a linear model on what several of them see, fitted to the few
labels, does fairly well; its soft predictions on the transfer set are what the student learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from coordinator.amalgamation.discriminant import MOST_LABELS, UNKNOWN, Discriminant

_PENALTIES = (1.0, 0.3, 0.1, 0.03)
"""The strongest first: each fit begins where the last ended."""
_PLENTY = 10
"""Labels for each feature, from which on a regression needs no help (Peduzzi et al. 1996)."""
_TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)


@dataclass(frozen=True)
class TaskHead:
    """logits = ((x - mean) / deviation) @ weight + bias, for features x [N, D].

    Cross-validation chose the `penalty` of a regression or, where that is None, the `temperature` that
    a discriminant's logits were divided by. `cv_score` is what it reached there; NaN where the choice
    is another head's.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    cv_score: float
    penalty: float | None
    temperature: float = 1.0

    def logits(self, features: Tensor) -> Tensor:
        """float64[N, classes]."""
        x = (features.double() - self.mean) / self.deviation
        return x @ self.weight + self.bias

    def probabilities(self, features: Tensor, temperature: float) -> Tensor:
        """softmax(logits / temperature), float32[N, classes]; below 1 sharpens."""
        return torch.softmax(self.logits(features) / temperature, 1).float()

    @torch.no_grad()
    def write_to(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Make `layer`, linear or a 1x1 convolution, compute these logits, standardisation included."""
        weight = self.weight / self.deviation[:, None]
        layer.weight.copy_(weight.T.reshape(layer.weight.shape))
        assert layer.bias is not None
        layer.bias.copy_(self.bias - self.mean @ weight)


Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits float64[N, outputs], targets) -> a scalar, convex in the logits."""
Score = Callable[[NDArray[np.float64], NDArray[np.generic]], float]
"""(logits [N, outputs], labels) -> what cross-validation goes by; more is better."""


@dataclass(frozen=True)
class _Scale:
    """mean and deviation [D] of the features of all images."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, labelled: Tensor, unlabelled: Tensor) -> _Scale:
        every = torch.cat([labelled, unlabelled]).double()
        return cls(every.mean(0), every.std(0, correction=0).clamp_min(1e-6))

    def applied(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / self.deviation


def fit_task_head(
    features: Tensor,
    labels: NDArray[np.int64],
    classes: int,
    unlabelled: Tensor,
    folds: int,
    seed: int,
    like: TaskHead | None = None,
) -> TaskHead:
    """A linear classifier of features [N, D] with labels [N]; unlabelled [M, D] of the same teachers.

    With fewer than ten labels for each feature the unlabelled images tell much, and the head is a
    `Discriminant`, unless in cross-validation over `folds` parts a logistic regression is better by more
    than two standard errors: guesses that are mostly wrong do harm. With more labels, or more than a
    discriminant is meant for, it is the regression. With `like` nothing is chosen: penalty or
    temperature are that head's.
    """
    y = torch.from_numpy(labels)
    part = stratified_folds(labels, min(folds, len(labels)), np.random.default_rng(seed))

    def regression() -> TaskHead:
        return fit_linear(features, y, classes, unlabelled, part, F.cross_entropy, _accuracy, like)

    plenty = len(labels) >= min(_PLENTY * features.shape[1], MOST_LABELS + 1)
    if plenty if like is None else like.penalty is not None:
        return regression()
    scale = _Scale.of(features, unlabelled)
    x, one_hot = scale.applied(features), F.one_hot(y, classes).double()
    discriminant = Discriminant(scale.applied(unlabelled))
    temperature, score = 1.0, math.nan
    if like is not None:
        temperature = like.temperature
    else:
        held = torch.zeros(len(x), classes, dtype=torch.float64)
        for fold in np.unique(part):
            rows = torch.from_numpy(part == fold)
            weight, bias = discriminant.fit(x[~rows], one_hot[~rows])
            held[rows] = x[rows] @ weight + bias
        # A class whose only label was held out is not known there.
        told = held[torch.arange(len(y)), y] > UNKNOWN / 2
        if told.any():
            temperature = min(
                _TEMPERATURES, key=lambda t: float(F.cross_entropy(held[told] / t, y[told]))
            )
        score = _accuracy(held.numpy(), labels)
        regressed = regression()
        if regressed.cv_score - score > 2 * math.sqrt(score * (1 - score) / len(x)):
            return regressed
    weight, bias = discriminant.fit(x, one_hot)
    line = weight / temperature, bias / temperature
    return TaskHead(scale.mean, scale.deviation, *line, score, None, temperature)


def _accuracy(logits: NDArray[np.float64], truth: NDArray[np.generic]) -> float:
    return float((logits.argmax(1) == truth).mean())


def fit_linear(
    features: Tensor,
    targets: Tensor,
    outputs: int,
    unlabelled: Tensor,
    part: NDArray[np.int64],
    loss: Loss,
    score: Score,
    like: TaskHead | None = None,
) -> TaskHead:
    """The linear head that minimises `loss` on standardised features, with an L2 penalty.

    features [N, D] with targets [N, …]; part [N] is the fold of each row. The penalty with the best
    `score` of the logits of held-out rows wins, the stronger one on equal scores; or it is that of `like`.
    """
    scale = _Scale.of(features, unlabelled)
    x = scale.applied(features)
    penalties: Sequence[float] = _PENALTIES
    reached = math.nan
    if like is not None and like.penalty is not None:
        penalties = (like.penalty,)
    else:
        held = np.zeros((len(penalties), len(x), outputs))
        for fold in np.unique(part):
            rows = part == fold
            held_out = torch.from_numpy(rows)
            fits = fit_path(x[~held_out], targets[~held_out], outputs, penalties, loss)
            for i, (weight, bias) in enumerate(fits):
                held[i, rows] = (x[held_out] @ weight + bias).numpy()
        scores = [score(logits, targets.numpy()) for logits in held]
        best = int(np.argmax(scores))
        penalties, reached = penalties[: best + 1], scores[best]
    weight, bias = fit_path(x, targets, outputs, penalties, loss)[-1]
    return TaskHead(scale.mean, scale.deviation, weight, bias, reached, penalties[-1])


def stratified_folds(
    labels: NDArray[np.int64], folds: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The fold of each image; every class is spread evenly over the folds."""
    part = np.empty(len(labels), dtype=np.int64)
    dealt = 0
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        part[members] = (np.arange(len(members)) + dealt) % folds
        dealt += len(members)
    return part


@dataclass(frozen=True)
class Precision:
    """When L-BFGS stops."""

    iterations: int = 200
    gradient: float = 1e-5
    change: float = 1e-7


_PRECISE = Precision()


def fit_path(
    x: Tensor,
    y: Tensor,
    classes: int,
    penalties: Sequence[float],
    loss: Loss,
    precision: Precision = Precision(),  # frozen
) -> list[tuple[Tensor, Tensor]]:
    """(weight [D, classes], bias [classes]) for each penalty, each fit started from the last."""
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    fits = []
    for penalty in penalties:
        optimiser = torch.optim.LBFGS(
            [weight, bias],
            max_iter=precision.iterations,
            tolerance_grad=precision.gradient,
            tolerance_change=precision.change,
            line_search_fn="strong_wolfe",
        )

        def objective(optimiser: torch.optim.LBFGS = optimiser, penalty: float = penalty) -> float:
            optimiser.zero_grad()
            value = loss(x @ weight + bias, y) + penalty / 2 * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            return float(value.detach())

        optimiser.step(objective)  # type: ignore[no-untyped-call]  # nor for this
        fits.append((weight.detach().clone(), bias.detach().clone()))
    return fits
