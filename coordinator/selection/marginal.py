"""The evidence that features carry about labels, under a Bayesian linear model.

For features Phi [P, D] (standardised) and one centred target t per class,

    t | w ~ N(Phi w, b I),   w ~ N(0, a I)   =>   t ~ N(0, b (r K + I)),   K = Phi Phi^T,  r = a / b

(MacKay 1992; LogME, You et al., ICML 2021, is the same quantity). b has a closed maximum for every r,
and r is the best of a grid, one for all classes: a teacher is not to fit each class with a prior of its
own. Concatenating the features of several teachers is adding their K, so a set of teachers costs one
eigendecomposition of [P, P], however many features they have.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_RATIOS = np.logspace(-3, 2.5, 23)
"""Of signal to noise per image, on average."""


def kernel(features: NDArray[np.float32]) -> Floats:
    """Features [P, D] -> K [P, P] of the standardised signed roots, sign(x) sqrt(|x|).

    The root because a pooled ReLU channel is near zero for most images and large for a few; a linear
    model with Gaussian noise takes neither well.
    """
    x = features.astype(np.float64)
    x = np.sign(x) * np.sqrt(np.abs(x))
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    k: Floats = x @ x.T
    return k


def log_evidence(k: Floats, targets: NDArray[np.float32]) -> float:
    """Of targets [P, classes] given K [P, P]: nats per image and class; higher is better.

    A kernel of zeros gives the evidence of knowing nothing.
    """
    images = len(k)
    t = targets.astype(np.float64)
    t = t - t.mean(0)
    # Scaled to unit variance, so that a rare class counts as much as a common one.
    t = t / np.maximum(t.std(0), 1e-6)
    values, vectors = np.linalg.eigh(k)
    values = np.maximum(values, 0)
    mean = values.mean()
    if mean <= 0:
        values = np.zeros_like(values)
        mean = 1.0
    power = (vectors.T @ t) ** 2
    spread = 1 + _RATIOS[:, None] * values / mean
    noise = (1 / spread) @ power / images
    per_class = -0.5 * (
        np.log(spread).mean(1)[:, None] + np.log(np.maximum(noise, 1e-12)) + 1 + np.log(2 * np.pi)
    )
    return float(per_class.mean(1).max())
