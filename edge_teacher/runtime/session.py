"""What every runtime offers, whatever executes the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def run_in_batches(
    session: Session, images: NDArray[np.uint8], output: str, batch: int = 64
) -> NDArray[np.float32]:
    """One output for any number of images, `batch` at a time: memory stays bounded."""
    parts = [
        session.run(images[start : start + batch], [output])[output]
        for start in range(0, len(images), batch)
    ]
    return np.concatenate(parts)
