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
