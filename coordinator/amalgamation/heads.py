"""Task heads on the concatenated features of the selected teachers.

No teacher knows the new task, but a linear model on what several of them see, fitted to the few
labels, does fairly well; its soft predictions on the transfer set are what the student learns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

_PENALTIES = (0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class TaskHead:
    """logits = ((x - mean) / deviation) @ weight + bias, for features x [N, D].

    `penalty` is the one chosen by cross-validation, `cv_score` what it reached there.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float
    cv_score: float

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


def fit_task_head(
    features: Tensor,
    labels: NDArray[np.int64],
    classes: int,
    unlabelled: Tensor,
    folds: int,
    seed: int,
) -> TaskHead:
    """Multinomial logistic regression with an L2 penalty, on standardised features.

    features [N, D] with labels [N]; unlabelled [M, D] of the same teachers makes the mean and
    deviation those of the many images. The penalty with the best accuracy over `folds` parts of the
    labelled images wins, the stronger one on equal accuracy.
    """
    part = stratified_folds(labels, min(folds, len(labels)), np.random.default_rng(seed))
    return fit_linear(
        features,
        torch.from_numpy(labels),
        classes,
        unlabelled,
        part,
        F.cross_entropy,
        lambda logits, truth: float((logits.argmax(1) == truth).mean()),
    )


def fit_linear(
    features: Tensor,
    targets: Tensor,
    outputs: int,
    unlabelled: Tensor,
    part: NDArray[np.int64],
    loss: Loss,
    score: Score,
) -> TaskHead:
    """The linear head that minimises `loss` on standardised features, with an L2 penalty.

    features [N, D] with targets [N, …]; part [N] is the fold of each row. The penalty with the best
    `score` of the logits of held-out rows wins, the stronger one on equal scores.
    """
    every = torch.cat([features, unlabelled]).double()
    mean = every.mean(0)
    deviation = every.std(0, correction=0).clamp_min(1e-6)
    x = (features.double() - mean) / deviation
    strongest_first = sorted(_PENALTIES, reverse=True)
    held = np.zeros((len(strongest_first), len(x), outputs))
    for fold in np.unique(part):
        rows = part == fold
        held_out = torch.from_numpy(rows)
        fits = fit_path(x[~held_out], targets[~held_out], outputs, strongest_first, loss)
        for i, (weight, bias) in enumerate(fits):
            held[i, rows] = (x[held_out] @ weight + bias).numpy()
    scores = [score(logits, targets.numpy()) for logits in held]
    best = int(np.argmax(scores))
    weight, bias = fit_path(x, targets, outputs, strongest_first[: best + 1], loss)[-1]
    return TaskHead(mean, deviation, weight, bias, strongest_first[best], scores[best])


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
