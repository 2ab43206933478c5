"""What can be tried, how it is watched, and what it is when it has been opened."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_teacher.runtime.session import Session


@dataclass(frozen=True)
class Watch:
    """How a build is watched, and ended before its time."""

    progress: Callable[[float], None] = lambda _share: None
    """Told the share that is done, from 0 to 1, never less than before."""
    cancelled: threading.Event = field(default_factory=threading.Event)


def _always(_images: NDArray[np.uint8]) -> bool:
    return True


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Opened:
    """A session that can answer."""

    session: Session
    fits: Callable[[NDArray[np.uint8]], bool] = _always
    """Whether it takes images of this size."""
    close: Callable[[], None] = _nothing
    build_s: float | None = None
    notes: tuple[str, ...] = ()


def _no_gpu() -> int:
    return 0


@dataclass(frozen=True)
class Candidate:
    """One possible choice. `open` raises CheckFailed or RuntimeFailed with the runtime's own words."""

    runtime: str
    provider: str
    precision: str
    version: str
    open: Callable[[Watch], Opened]

    @property
    def label(self) -> str:
        return f"{self.runtime} {self.provider} {self.precision}"


@dataclass(frozen=True)
class Found:
    """What there is to be tried on a machine."""

    candidates: list[Candidate]
    """Likely the fastest first."""
    absent: Mapping[str, str]
    """What there is none of, and why."""
    gpu: str = ""
    """Name and architecture."""
    free_bytes: Callable[[], int] = _no_gpu
    """What the GPU could still give."""
