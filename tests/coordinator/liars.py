"""Teachers that fail, each in one way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import Unreachable
from tests.coordinator.local_teacher import LocalTeacher, random_teacher

Answer = NDArray[np.float32]
Spoil = Callable[[Answer], Answer]


def _gone(_answer: Answer) -> Answer:
    raise Unreachable("it went offline while it was asked")


def _not_a_number(answer: Answer) -> Answer:
    spoilt = answer.copy()
    spoilt.reshape(-1)[answer.size // 2] = np.nan
    return spoilt


SPOILT: dict[str, Spoil] = {
    "gone": _gone,
    "not a number": _not_a_number,
    "infinite": lambda answer: np.where(answer == answer.max(), np.inf, answer),
    "wrong shape": lambda answer: answer.reshape(len(answer), -1, 1, 1, 1),
    "too few images": lambda answer: answer[:-1],
    "too many images": lambda answer: np.concatenate([answer, answer[:1]]),
}


class Liar(LocalTeacher):
    """Its answers by `method` are `spoil`t, from the `after`-th question on, until it is `honest`."""

    def __init__(self, name: str, seed: int, method: str, spoil: Spoil, after: int = 0) -> None:
        made = random_teacher(name, seed)
        super().__init__(name, made.stages, made.head)
        self.method, self.spoil, self.after = method, spoil, after
        self.honest = False
        self.questions = 0

    def saliency(self, images: NDArray[np.uint8]) -> Answer:
        return self._spoilt("saliency", super().saliency(images))

    def pooled(
        self, images: NDArray[np.uint8], *, mirrored: bool = False, tap: str | None = None
    ) -> Answer:
        return self._spoilt("pooled", super().pooled(images, mirrored=mirrored, tap=tap))

    def features(self, images: NDArray[np.uint8]) -> Answer:
        return self._spoilt("features", super().features(images))

    def _spoilt(self, method: str, answer: Answer) -> Answer:
        if method != self.method or self.honest:
            return answer
        self.questions += 1
        return self.spoil(answer) if self.questions > self.after else answer
