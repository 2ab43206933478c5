"""A linear head that learns from the unlabelled images too: semi-supervised discriminant analysis.

Few labels tell where the classes are, but not along which of a thousand features they are told apart;
the many unlabelled images do. Two steps:

1. Kernel ridge regression of the labels, of a Gaussian kernel, guesses every unlabelled image's class.
2. Fisher's discriminants of all images, each with the label or the guess it has: class means and one
   covariance within the classes. That is one step of expectation maximisation for a Gaussian of each
   class with a common covariance (McLachlan 1975), all classes alike likely beforehand: how many labels
   a class has says little about how frequent it is. Further steps drift away from the labels.

Features are standardised by the caller. How the numbers below were found is in docs/method.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_LABELS = 5000
"""Above it the kernel of the labels is too large to be worth it."""

UNKNOWN = -1e4
"""A logit beside which all others are likely."""
_WIDTH = 2.0
"""Of the kernel: exp(-|x - y|^2 / (2 * _WIDTH * D)) for D features of unit variance."""
_RIDGE = 0.1
_SHARPNESS = 8.0
"""What the regression's answers, which lie near 0 and 1, are multiplied by to be logits."""
_LABEL_WEIGHT = 3.0
"""Of an image with a label, in images without."""
_SHRINKAGE = 0.3
"""Added to every feature's variance within the classes, which is at most 1."""
_ROWS = 4096


class Discriminant:
    """What does not change with the labels that are held out: the unlabelled images z [M, D]."""

    def __init__(self, unlabelled: Tensor) -> None:
        self._z = unlabelled
        self._products = unlabelled.T @ unlabelled

    def fit(self, x: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
        """x float64[N, D] with labels float64[N, classes] -> (weight [D, classes], bias [classes]).

        A class without a label is no image's: its bias is `UNKNOWN`.
        """
        known = one_hot.sum(0) > 0
        if not known.all():
            weight = x.new_zeros(x.shape[1], len(known))
            bias = x.new_full((len(known),), UNKNOWN)
            weight[:, known], bias[known] = self.fit(x, one_hot[:, known])
            return weight, bias
        guesses = _guessed(x, one_hot, self._z)
        shares = _LABEL_WEIGHT * one_hot
        counts = shares.sum(0) + guesses.sum(0)
        means = (shares.T @ x + guesses.T @ self._z) / counts[:, None]
        scatter = _LABEL_WEIGHT * (x.T @ x) + self._products - (means.T * counts) @ means
        within = scatter / counts.sum()
        within.diagonal().add_(_SHRINKAGE)
        weight = torch.linalg.solve(within, means.T)
        return weight, -0.5 * (means.T * weight).sum(0)


def _guessed(x: Tensor, one_hot: Tensor, z: Tensor) -> Tensor:
    """The class of each z [M, D] as probabilities [M, classes]."""
    eye = torch.eye(len(x), dtype=x.dtype)
    centred = one_hot - 1 / one_hot.shape[1]
    answers = torch.linalg.solve(_kernel(x, x) + _RIDGE * eye, centred)
    # By parts: a kernel of all images at once may be larger than they are.
    found = [_kernel(part, x) @ answers for part in torch.split(z, _ROWS)]
    return torch.softmax(_SHARPNESS * torch.cat(found), 1)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)
    return torch.exp(squares.clamp_min(0) / (-2 * _WIDTH * a.shape[1]))
