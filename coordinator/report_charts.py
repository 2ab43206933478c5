"""The geometry of the learning curves; the template draws it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from coordinator.report import CurvePoint

_MARGIN = (12.0, 16.0, 42.0, 44.0)  # top, right, bottom, left
_GLYPH = 6.6  # the width of a small letter, in pixels, for keeping labels apart


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Band:
    """One stage of the training: from `x` for `width`, its name at the label's position."""

    name: str
    x: float
    width: float
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Line:
    name: str
    path: str
    """SVG path data."""
    extension: str
    """Path from the last point to the right edge, for a line that ends early; may be empty."""
    end: tuple[float, float]
    last: float
    """Accuracy at the end, a fraction."""
    label_above: bool
    """Where its name goes, such that the names of two lines do not meet."""


@dataclass(frozen=True)
class Chart:
    """Accuracy over images seen, laid out for one width; all numbers are SVG user units."""

    width: float
    height: float
    plot: tuple[float, float, float, float]
    """left, top, right, bottom"""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bands: tuple[Band, ...]
    lines: tuple[Line, ...]


def learning_curves(
    curves: Mapping[str, Sequence[CurvePoint]], staged: str, width: float, height: float
) -> Chart | None:
    """Lay out every curve that has accuracies; `staged` names the one whose stages are marked.

    None where no curve has two measured points.
    """
    measured = {
        name: [(p.images_seen, p.accuracy) for p in points if p.accuracy is not None]
        for name, points in curves.items()
    }
    measured = {name: points for name, points in measured.items() if len(points) > 1}
    end = max((seen for points in measured.values() for seen, _ in points), default=0)
    if not end:
        return None
    top, right, bottom, left = _MARGIN
    stages = _stages(curves.get(staged, ()))
    labels = _place_labels(stages, width - left - right)
    top += 15 * (max((row for _, row in labels), default=-1) + 1)
    values = [accuracy for points in measured.values() for _, accuracy in points]
    low, high, step = _nice_range(min(values), max(values))

    def x(seen: float) -> float:
        return round(left + (width - left - right) * seen / end, 1)

    def y(accuracy: float) -> float:
        return round(top + (height - top - bottom) * (high - accuracy) / (high - low), 1)

    x_step = _nice_step(end / (4 if width < 500 else 8))
    return Chart(
        width=width,
        height=height,
        plot=(left, top, width - right, height - bottom),
        x_ticks=tuple(
            Tick(x(i * x_step), _short(i * x_step)) for i in range(int(end / x_step + 1e-9) + 1)
        ),
        y_ticks=tuple(
            Tick(y(low + i * step), f"{100 * (low + i * step):.0f}")
            for i in range(round((high - low) / step) + 1)
        ),
        bands=tuple(
            Band(name, x(a), round(x(b) - x(a), 1), round(left + at, 1), 12 + 15 * row)
            for (name, a, b), (at, row) in zip(stages, labels, strict=True)
        ),
        lines=tuple(_line(name, measured, x, y, end) for name in measured),
    )


def _line(
    name: str,
    measured: Mapping[str, Sequence[tuple[int, float]]],
    x: Callable[[float], float],
    y: Callable[[float], float],
    end: int,
) -> Line:
    points = measured[name]
    corners = [f"{x(seen)} {y(accuracy)}" for seen, accuracy in points]
    last_seen, last = points[-1]
    return Line(
        name=name,
        path="M" + "L".join(corners),
        extension="" if last_seen == end else f"M{corners[-1]}H{x(end)}",
        end=(x(last_seen), y(last)),
        last=last,
        label_above=last >= max(other[-1][1] for other in measured.values()),
    )


def _stages(points: Sequence[CurvePoint]) -> list[tuple[str, int, int]]:
    """(name, first, last images seen); "round 1", "round 2" are one stage, "2 rounds"."""
    found = []
    start = 0
    for name, group in groupby(points, key=lambda p: re.sub(r"\s*\d+$", "", p.stage)):
        stages = {p.stage: p.images_seen for p in group}
        last = max(stages.values())
        found.append((f"{len(stages)} {name}s" if len(stages) > 1 else name, start, last))
        start = last
    return found


def _place_labels(stages: Sequence[tuple[str, int, int]], width: float) -> list[tuple[float, int]]:
    """For each stage's name where it begins, within `width`, and in which row, so that none meet."""
    end = max((last for _, _, last in stages), default=1) or 1
    placed: list[tuple[float, int]] = []
    free: list[float] = []  # by row, where the next label may begin
    for name, first, _ in stages:
        length = _GLYPH * len(name)
        at = max(0.0, min(width * first / end + 4, width - length))
        row = next((r for r, begin in enumerate(free) if begin <= at), len(free))
        free[row : row + 1] = [at + length + 2 * _GLYPH]
        placed.append((at, row))
    return placed


def _nice_step(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, … that is not smaller."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _nice_range(low: float, high: float) -> tuple[float, float, float]:
    """Multiples of a nice step around [low, high], within [0, 1]; and the step."""
    step = _nice_step(max(high - low, 0.05) / 5)
    low, high = max(0.0, math.floor(low / step) * step), min(1.0, math.ceil(high / step) * step)
    if high - low < step / 2:
        low, high = (low - step, high) if low >= step else (low, high + step)
    return low, high, step


def _short(count: float) -> str:
    """40000 -> "40k"."""
    return f"{count / 1000:g}k" if count >= 1000 else f"{count:g}"
