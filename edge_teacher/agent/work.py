"""Images that are being computed, for one query or for several that want the same ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import Expired
from edge_teacher.contract.images import Images
from edge_teacher.rpc.line import Asked
from edge_teacher.rpc.serve import Answer
from edge_teacher.runtime import Session

Floats = NDArray[np.float32]

Keep = Callable[[Mapping[str, Floats], slice], Mapping[str, NDArray[np.generic]]]
"""What is left of a step's outputs for the answer; the slice says which of the images they are about."""


class Kind(NamedTuple):
    """What may share a step: one graph, one size of images, the same outputs."""

    session: int
    size: tuple[int, ...]
    """(height, width)"""
    outputs: frozenset[str]


@dataclass(eq=False)
class Inference:
    """What one query needs: outputs of a graph for its images, and what becomes of them."""

    session: Session
    images: Images
    """uint8[N, H, W, 3]"""
    pixels: Hashable
    """Equal where the images are the same, before they are mirrored."""
    mirrored: bool
    outputs: frozenset[str]
    keep: Keep
    finish: Callable[[Mapping[str, NDArray[np.generic]], float], Answer]
    """(all that was kept, milliseconds of computing) to the answer."""
    needs_bytes: int
    """What the answer will take while it is made."""
    same: Hashable = None
    """Equal where `keep` does the same to every image, so that it can be done to a whole step at once; None
    where it depends on which of the images they are."""

    about: Hashable = field(init=False)
    """Equal where one pass through the graph serves both."""

    def __post_init__(self) -> None:
        self.about = (id(self.session), self.pixels, self.mirrored)


@dataclass(eq=False)
class Listener:
    """One query of a work, with what was kept for it so far."""

    asked: Asked
    inference: Inference
    left: int
    release: Callable[[], None]
    whole: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    compute_s: float = 0.0
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, kept: Mapping[str, NDArray[np.generic]], where: slice, seconds: float) -> bool:
        """What it needs of a step, which nobody changes any more; whether that was the last of it."""
        rows = len(self.inference.images)
        with self.lock:
            if self.ended:
                return False  # it was refused, or withdrawn
            if (
                where.stop - where.start == rows
            ):  # all in one step: there is nothing to put together
                self.whole = {name: _alone(values) for name, values in kept.items()}
                kept = {}
            for name, values in kept.items():
                if name not in self.whole:
                    self.whole[name] = np.empty((rows, *values.shape[1:]), values.dtype)
                self.whole[name][where] = values
            self.left -= where.stop - where.start
            self.compute_s += seconds
            return self.left == 0

    def finish(self) -> None:
        """The answer is sent, or told why there is none."""
        if not self._end():
            return
        try:
            body, tensors = self.inference.finish(self.whole, self.compute_s * 1e3)
            self.asked.answer(body, tensors)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to this query alone
            self.asked.refuse(error)
        finally:
            self.whole = {}
            self.release()

    def refuse(self, error: Exception) -> None:
        if self._end():
            self.whole = {}
            self.asked.refuse(error)
            self.release()

    def _end(self) -> bool:
        with self.lock:
            ended, self.ended = self.ended, True
            return not ended


def _alone(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """A copy of what is little of a step: an answer is kept for minutes, and would keep all of the step."""
    base = values.base
    if isinstance(base, np.ndarray) and values.nbytes * 2 < base.nbytes:
        return np.array(values)
    return values


@dataclass(eq=False)
class Work:
    """Images that go through the graph once, for whoever wants something of them."""

    asker: str
    first: Inference
    listeners: list[Listener]
    outputs: frozenset[str]
    next: int = 0
    """The first row that is not computed yet."""

    @property
    def kind(self) -> Kind:
        return Kind(id(self.first.session), self.first.images.shape[1:3], self.outputs)

    @property
    def left(self) -> int:
        return len(self.first.images) - self.next

    def join(self, listener: Listener) -> None:
        self.listeners.append(listener)
        self.outputs |= listener.inference.outputs

    def take(self, rows: int) -> slice:
        where = slice(self.next, self.next + rows)
        self.next += rows
        return where

    def pixels(self, where: slice) -> Images:
        images = self.first.images[where]
        return images[:, :, ::-1] if self.first.mirrored else images

    def drop_unwanted(self) -> bool:
        """Nothing more is computed for who does not wait any longer; whether anybody does."""
        for listener in self.listeners:
            if not listener.asked.wanted:
                listener.refuse(Expired("nobody waits for it any more"))
        self.listeners = [listener for listener in self.listeners if not listener.ended]
        return bool(self.listeners)
