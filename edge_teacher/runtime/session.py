"""What every runtime offers, whatever executes the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.messages import RuntimeInfo


class Session(Protocol):
    """A loaded graph with the one input `images: uint8[N, H, W, 3]`."""

    @property
    def info(self) -> RuntimeInfo: ...

    @property
    def outputs(self) -> tuple[str, ...]: ...

    def run(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        """The named outputs for a batch. Raises RuntimeFailed with the runtime's own words."""
        ...


class InPieces:
    """A session that is asked about at most `most` images at once."""

    def __init__(self, session: Session, most: int) -> None:
        self._session = session
        self._most = most

    @property
    def info(self) -> RuntimeInfo:
        return self._session.info

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._session.outputs

    def run(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        """As the session's own; RuntimeFailed too."""
        if len(images) <= self._most:
            return self._session.run(images, outputs)
        pieces = [
            self._session.run(images[start : start + self._most], outputs)
            for start in range(0, len(images), self._most)
        ]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in outputs}


Reduce = Callable[[NDArray[np.float32], slice], NDArray[np.float32]]
"""What becomes of a batch's output; the slice says which of the images it is about."""


def run_in_batches(
    session: Session,
    images: NDArray[np.uint8],
    output: str,
    batch: int = 64,
    reduce: Reduce = lambda found, _where: found,
) -> NDArray[np.float32]:
    """One output for any number of images, `batch` at a time: only what `reduce` leaves is kept of each."""
    whole: NDArray[np.float32] | None = None
    for start in range(0, len(images), batch):
        where = slice(start, start + batch)
        found = reduce(session.run(images[where], [output])[output], where)
        if whole is None:
            whole = np.empty((len(images), *found.shape[1:]), found.dtype)
        whole[where] = found
    if whole is None:
        raise ValueError("there are no images")
    return whole
