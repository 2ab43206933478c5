"""LogME, as published: the log maximum evidence of features about labels (You et al., ICML 2021).

Beside `marginal`, which is this kit's own: features are taken as they come, every class has a prior of its
own, and a set of teachers is their features side by side. With features pooled under a saliency map it says
what a teacher sees where it looks. Measured in docs/selection.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEPS = 30


def logme(features: NDArray[np.float32], targets: NDArray[np.float32]) -> float:
    """Features [P, D], targets [P, classes] -> nats per image and class, by the fixed point of MacKay."""
    x = features.astype(np.float64)
    x = x - x.mean(0)
    images, width = x.shape
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    power = s**2
    total = 0.0
    for t in targets.T.astype(np.float64):
        z = (u.T @ t) ** 2
        rest = max(float(t @ t - z.sum()), 0.0)
        alpha = beta = 1.0
        for _ in range(_STEPS):
            ratio = alpha / beta
            gamma = float((power / (power + ratio)).sum())
            weights = float((power * z / (power + ratio) ** 2).sum())
            residual = float((z / (1 + power / ratio) ** 2).sum()) + rest
            alpha = max(gamma, 1e-9) / (weights + 1e-9)  # features that never vary explain nothing
            beta = (images - gamma) / (residual + 1e-9)
            if abs(alpha / beta - ratio) / ratio < 1e-3:
                break
        ratio = alpha / beta
        weights = float((power * z / (power + ratio) ** 2).sum())
        residual = float((z / (1 + power / ratio) ** 2).sum()) + rest
        logs = float(np.log(alpha + beta * power).sum()) + (width - len(s)) * np.log(alpha)
        total += (
            width / 2 * np.log(alpha)
            + images / 2 * np.log(beta)
            - logs / 2
            - beta / 2 * residual
            - alpha / 2 * weights
            - images / 2 * np.log(2 * np.pi)
        ) / images
    return float(total / targets.shape[1])
