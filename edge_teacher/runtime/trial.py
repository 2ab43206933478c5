"""Trying a runtime out: does it answer as the CPU does, and what does it cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed
from edge_teacher.runtime.session import Session
from edge_teacher.stopwatch import Stopwatch

BATCHES = (1, 32)
"""What is measured: one image, and as many as a coordinator asks about at once."""
TOLERANCE = {"fp32": 1e-2, "fp16": 2e-2}
"""Largest difference from the CPU's answer, over its largest value; fp32 with the 10 bits of TF32.
Quantised students are held to their canary batch instead."""
MAP_COSINE = 0.99
MAPS_AGREE = 0.9
"""Share of saliency maps that have to agree: where two classes are nearly as likely, a map may explain the
other one, whatever the precision."""
_ROUNDS = 5
_MOST_SAID = 400
_ENOUGH_S = 0.5


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One possible choice, and what came of it."""

    runtime: str
    provider: str
    precision: str
    version: str = ""
    state: Literal["picked", "usable", "refused"] = "usable"
    reason: str = ""
    """Why it was picked, or not."""
    load_s: float | None = None
    """Until it could answer, without building an engine."""
    build_s: float | None = None
    """For building an engine; None if there was nothing to build, or it was in the cache."""
    ms_per_image: tuple[float, ...] = ()
    """At the batches of 1 and 32."""
    memory_bytes: int | None = None
    """That the process and the GPU took more of after loading and running it than before."""
    largest_difference: float | None = None
    """From the CPU's answers on the probe images, over their largest value; of maps, 1 - cosine."""
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.runtime} {self.provider} {self.precision}"

    @property
    def times(self) -> str:
        """What was measured, for a sentence."""
        one, many = self.ms_per_image
        return f"{many:.3g} ms per image in batches of 32, {one:.3g} alone"


class Difference(msgspec.Struct, frozen=True):
    largest: float
    problem: str
    """Empty if the answers agree."""


def difference(
    found: Mapping[str, NDArray[np.float32]],
    wanted: Mapping[str, NDArray[np.float32]],
    precision: str,
) -> Difference:
    """How far answers are from those of the CPU, and whether that is too far."""
    largest, problem = 0.0, ""
    for name, want in wanted.items():
        have = found[name]
        if have.shape != want.shape or not np.isfinite(have).all():
            return Difference(
                float("inf"), f"{name} is {list(have.shape)} or not finite, not {list(want.shape)}"
            )
        if name == "saliency":
            cosine = _cosine(have, want)
            off = float(1 - cosine.min(initial=1))
            agree = float((cosine >= MAP_COSINE).mean())
            if agree < MAPS_AGREE:
                problem = f"only {agree:.0%} of the saliency maps agree with the CPU's"
        else:
            off = float(np.abs(have - want).max(initial=0)) / max(
                float(np.abs(want).max(initial=0)), 1e-12
            )
            allowed = TOLERANCE.get(precision, float("inf"))
            if off > allowed:
                problem = f"{name} differs from the CPU's by {off:.2g} (allowed {allowed:g})"
        largest = max(largest, off)
    return Difference(largest, problem)


def require_agreement(
    session: Session,
    wanted: Mapping[str, NDArray[np.float32]],
    images: NDArray[np.uint8],
    precision: str,
) -> float:
    """The largest difference. Raises CheckFailed if it is too large."""
    found = difference(session.run(images, list(wanted)), wanted, precision)
    if found.problem:
        raise CheckFailed(found.problem)
    return found.largest


def require_finite(found: Mapping[str, NDArray[np.float32]]) -> None:
    """All that can be asked where there is no CPU's answer. Raises CheckFailed."""
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise CheckFailed(f"{name} is not finite on the probe images")


def one_line(said: object) -> str:
    """A runtime may say pages; the card is one message, and people read lines."""
    text = " ".join(str(said).split())
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}…"


def ms_per_image(session: Session, images: NDArray[np.uint8]) -> tuple[float, ...]:
    """For all outputs, at each of BATCHES: of the fastest round, since a busy machine only ever adds time."""
    return tuple(_fastest_ms(session, _batch(images, size)) for size in BATCHES)


def slower(trial: Trial, other: Trial) -> bool:
    """Time at the large batch decides, that of one image within 5 %."""
    mine, theirs = trial.ms_per_image, other.ms_per_image
    if abs(mine[1] - theirs[1]) > 0.05 * theirs[1]:
        return mine[1] > theirs[1]
    return mine[0] >= theirs[0]


def _batch(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return images[np.arange(size) % len(images)]


def _fastest_ms(session: Session, images: NDArray[np.uint8]) -> float:
    outputs = session.outputs
    session.run(images, outputs)  # the first run of a shape prepares it
    times: list[float] = []
    watch = Stopwatch()
    end = time.perf_counter() + _ENOUGH_S
    while len(times) < _ROUNDS or (time.perf_counter() < end and len(times) < 50):
        started = watch.start()
        session.run(images, outputs)
        times.append(watch.seconds(started))
    return round(min(times) * 1e3 / len(images), 4)


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Per map; two flat maps agree, a flat and another do not."""
    x, y = (each.reshape(len(each), -1).astype(np.float64) for each in (a, b))
    product = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    both_flat = ~x.any(axis=1) & ~y.any(axis=1)
    return np.where(both_flat, 1.0, (x * y).sum(1) / np.where(product > 0, product, 1))
