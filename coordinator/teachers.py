"""A teacher as the coordinator sees it: something that answers questions about images."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Teacher(Protocol):
    """What selection and amalgamation may ask of a teacher, wherever it runs."""

    @property
    def name(self) -> str:
        """The device id; unique in a fleet."""
        ...

    def saliency(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """images [N, H, W, 3] -> maps [N, S, S] in [0, 1]."""
        ...

    def pooled(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """images [N, H, W, 3] -> the mean over pixels of the last feature map, [N, C]."""
        ...

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """images [N, H, W, 3] -> the last feature map itself, [N, C, h, w]."""
        ...
