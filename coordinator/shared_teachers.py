"""Teachers that several processes ask together: each about its share, and all have every answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.ranks import Ranks
from coordinator.teachers import Teacher
from edge_teacher.contract.errors import FedsaError

_Ask = Callable[[slice], NDArray[np.float32]]
"""The images of one process, of those that all ask about -> the teacher's answer."""


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
        return self._ask(len(images), lambda mine: self._teacher.saliency(images[mine]))

    def pooled(
        self, images: NDArray[np.uint8], *, mirrored: bool = False, tap: str | None = None
    ) -> NDArray[np.float32]:
        return self._ask(
            len(images),
            lambda mine: self._teacher.pooled(images[mine], mirrored=mirrored, tap=tap),
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
            lambda mine: self._teacher.attended(images[mine], attention[mine], tap=tap),
        )

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._ask(len(images), lambda mine: self._teacher.features(images[mine]))

    def _ask(self, count: int, ask: _Ask) -> NDArray[np.float32]:
        """Raises, in every process, the error that the first of them met."""
        ranks = self._ranks
        mine_of_all = slice(ranks.rank, None, ranks.world)
        answer: NDArray[np.float32] | None = None
        error: FedsaError | None = None
        try:
            if ranks.rank < count:
                answer = ask(mine_of_all)
        except FedsaError as met:
            error = met
        shape = None if answer is None else answer.shape[1:]
        said = ranks.gather((error, shape), self._group)
        for theirs, _ in said:
            if theirs is not None:
                raise theirs
        (tail,) = {shape for _, shape in said if shape is not None} or {()}
        rows = -(-count // ranks.world)
        mine = torch.zeros(rows, *tail)
        if answer is not None:
            mine[: len(answer)] = torch.from_numpy(answer)
        whole = np.empty((count, *tail), np.float32)
        for rank, gathered in enumerate(ranks.gather_tensors(mine, self._group)):
            part = whole[rank :: ranks.world]
            part[:] = gathered[: len(part)].numpy()
        return whole
