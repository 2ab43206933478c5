"""Teachers that several processes ask together: each about its share, and all have every answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.ranks import Ranks
from coordinator.teachers import Teacher
from edge_teacher.contract.errors import CheckFailed, FedsaError

_Ask = Callable[[slice], NDArray[np.float32]]
"""Which of the images, as rows -> what the teacher answers about those."""


def shared(teachers: Mapping[str, Teacher], ranks: Ranks) -> dict[str, Teacher]:
    """The same teachers, of which each process asks about the images rank::world only.

    They may be asked on a thread each: every teacher has a channel of its own between the processes.
    """
    if ranks.alone:
        return dict(teachers)
    return {name: SharedTeacher(teachers[name], ranks) for name in sorted(teachers)}


class SharedTeacher:
    """A Teacher. All processes must ask it the same, in the same order."""

    def __init__(self, teacher: Teacher, ranks: Ranks) -> None:
        self._teacher = teacher
        self._ranks = ranks
        self._group: Any = ranks.new_group()

    @property
    def name(self) -> str:
        return self._teacher.name

    @property
    def identity(self) -> str:
        return self._teacher.identity

    def saliency(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._ask(len(images), lambda rows: self._teacher.saliency(images[rows]))

    def pooled(
        self, images: NDArray[np.uint8], *, mirrored: bool = False, tap: str | None = None
    ) -> NDArray[np.float32]:
        return self._ask(
            len(images),
            lambda rows: self._teacher.pooled(images[rows], mirrored=mirrored, tap=tap),
        )

    def attended(
        self,
        images: NDArray[np.uint8],
        attention: NDArray[np.float32],
        *,
        tap: str | None = None,
    ) -> NDArray[np.float32]:
        return self._ask(
            len(images),
            lambda rows: self._teacher.attended(images[rows], attention[rows], tap=tap),
        )

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._ask(len(images), lambda rows: self._teacher.features(images[rows]))

    def _ask(self, images: int, ask: _Ask) -> NDArray[np.float32]:
        """Raises, in every process, the error that the first of them met.

        Raises CheckFailed, in all of them too, for answers that do not make one array.
        """
        ranks = self._ranks
        rows = slice(ranks.rank, images, ranks.world)
        share = len(range(images)[rows])
        answer: NDArray[np.float32] | None = None
        error: FedsaError | None = None
        try:
            if share:
                answer = ask(rows)
                if len(answer) != share:
                    raise CheckFailed(
                        f"{self.name} answered {share} images with {len(answer)} rows"
                    )
        except FedsaError as met:
            answer, error = None, met
        shape = None if answer is None else answer.shape[1:]
        said = ranks.gather((error, shape), self._group)
        for theirs, _ in said:
            if theirs is not None:
                raise theirs
        shapes = sorted({shape for _, shape in said if shape is not None})
        if len(shapes) > 1:
            raise CheckFailed(
                f"{self.name} answered one process with features of shape {list(shapes[0])} for each "
                f"image, and another with {list(shapes[1])}"
            )
        tail = shapes[0] if shapes else ()
        mine = torch.zeros(-(-images // ranks.world), *tail)
        if answer is not None:
            mine[:share] = torch.from_numpy(answer)
        whole = np.empty((images, *tail), np.float32)
        for rank, gathered in enumerate(ranks.gather_tensors(mine, self._group)):
            part = whole[rank :: ranks.world]
            part[:] = gathered[: len(part)].numpy()
        return whole
