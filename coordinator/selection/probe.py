"""How good a set of teachers is, in truth: the accuracy of a linear probe on all their features.

This is the measure that selections are judged by in studies (docs/selection.md); a run has no use for
it, except one with the `oracle`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from coordinator.data import LabelledImages
from coordinator.selection.choice import Features, Judge

_PENALTY = 0.1
_ITERATIONS = 60


def probe_accuracy(
    features: Features,
    labels: NDArray[np.int64],
    test_features: Features,
    test_labels: NDArray[np.int64],
) -> float:
    """Of multinomial logistic regression fitted to features [P, D], on test features [T, D]."""
    mean, deviation = features.mean(0), np.maximum(features.std(0), 1e-6)
    x = torch.from_numpy((features - mean) / deviation).double()
    y = torch.from_numpy(labels)
    weight = torch.zeros(x.shape[1], int(labels.max()) + 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-4,
        tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + _PENALTY / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return float(value.detach())

    optimiser.step(loss)  # type: ignore[no-untyped-call]  # nor for this
    test = torch.from_numpy((test_features - mean) / deviation).double()
    with torch.no_grad():
        guess = (test @ weight + bias).argmax(1).numpy()
    return float((guess == test_labels).mean())


def judge_of(
    features: Mapping[str, Features],
    probe: LabelledImages,
    test_features: Mapping[str, Features],
    test: LabelledImages | None,
) -> Judge | None:
    """None unless the teachers' features of a test set are there."""
    if test is None or not test_features:
        return None

    def judge(names: Sequence[str]) -> float:
        return probe_accuracy(
            np.concatenate([features[name] for name in names], axis=1),
            probe.labels,
            np.concatenate([test_features[name] for name in names], axis=1),
            test.labels,
        )

    return judge
