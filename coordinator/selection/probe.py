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

from coordinator.amalgamation.heads import Precision, fit_path
from coordinator.data import LabelledImages
from coordinator.selection.choice import Features, Judge

_PENALTY = 0.1
# Hundreds of sets are judged, and compared only with each other.
_PRECISION = Precision(iterations=60, gradient=1e-4, change=1e-6)


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
    classes = int(labels.max()) + 1
    ((weight, bias),) = fit_path(x, y, classes, [_PENALTY], F.cross_entropy, _PRECISION)
    test = torch.from_numpy((test_features - mean) / deviation).double()
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
