"""LogME, the log maximum evidence of features about labels (You et al., ICML 2021), without the offsets.

Beside `marginal`, which is this kit's own: features keep the scales they come in, every class has a prior of
its own, and a set of teachers is their features side by side. With features pooled under a saliency map it
says what a teacher sees where it looks. Other than as published, features and targets are both centred: the
model has no offset, and its weights would else have to tell how frequent a class is. Measured in
docs/selection.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEPS = 30


def logme(features: NDArray[np.float32], targets: NDArray[np.float32]) -> float:
    """Features [P, D], targets [P, classes] -> nats per image and class, by the fixed point of MacKay.

    Both are centred over the images. A class that no image or every image shows counts for nothing: there
    is nothing of it to tell. 0 where that holds for all.
    """
    centred = targets.astype(np.float64)
    centred = centred[:, np.ptp(centred, axis=0) > 0]
    if not centred.shape[1]:
        return 0.0
    centred -= centred.mean(0)
    x = features.astype(np.float64)
    x = x - x.mean(0)
    images, width = x.shape
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    power = s**2
    total = 0.0
    for t in centred.T:
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
    return float(total / centred.shape[1])
