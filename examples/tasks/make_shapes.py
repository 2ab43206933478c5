"""Draws small pictures of shapes as data of every kind of task: python make_shapes.py --out shapes

On noisy ground lie a disc, a square, both or neither, each in a colour of its own picture. What there is
to learn: `which` (one of them is there: its name), `tags` (what is there, any number), `outline` (what
every pixel belongs to).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 32
NAMES = ("disc", "square")
SETS = {"probe": 120, "test": 100, "transfer": 400}


def draw(
    rng: np.random.Generator, there: tuple[bool, bool]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A picture uint8[SIZE, SIZE, 3] and its mask uint8[SIZE, SIZE]: 0 ground, 1 disc, 2 square."""
    picture = rng.normal(90, 25, (SIZE, SIZE, 3))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    y, x = np.mgrid[:SIZE, :SIZE]
    halves = rng.permutation(2)
    for shape, here in enumerate(there):
        if not here:
            continue
        radius = rng.integers(5, 8)
        cy, cx = rng.integers(8, SIZE - 8), 8 + 16 * halves[shape]
        inside = (
            (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
            if shape == 0
            else np.maximum(abs(y - cy), abs(x - cx)) <= radius
        )
        picture[inside] += np.array([(90, 60, -20), (-20, 50, 100)][shape]) + rng.normal(0, 10, 3)
        mask[inside] = shape + 1
    return np.clip(picture, 0, 255).astype(np.uint8), mask


def save(pixels: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    for seed, (name, count) in enumerate(SETS.items()):
        rng = np.random.default_rng(seed)
        rows = []
        for i in range(count):
            file = f"{i:04}.png"
            there = bool(rng.integers(2)), bool(rng.integers(2))
            picture, mask = draw(rng, there)
            if name == "transfer":
                save(picture, out / name / file)
                continue
            save(picture, out / "tags" / name / file)
            rows.append((file, ";".join(n for n, here in zip(NAMES, there, strict=True) if here)))
            save(picture, out / "outline" / name / "images" / file)
            save(mask, out / "outline" / name / "masks" / file)
            one = int(rng.integers(2))
            save(draw(rng, (one == 0, one == 1))[0], out / "which" / name / NAMES[one] / file)
        if rows:
            with (out / "tags" / name / "labels.csv").open("w", newline="") as table:
                csv.writer(table).writerows([("file", "classes"), *rows])
            (out / "outline" / name / "classes.txt").write_text("ground\ndisc\nsquare\n")
    print(f"{out}: which (single-label), tags (multi-label), outline (dense), and transfer")


if __name__ == "__main__":
    main()
