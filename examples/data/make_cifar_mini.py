"""Cut cifar10-mini.tar.xz, a small CIFAR-10, out of the whole data set as JPEG files.

    python examples/data/make_cifar_mini.py ../shared/data/cifar10.tar.xz

The source holds {train,test}/<class>/<number>.jpg. The cut keeps the JPEG bytes as they are:

    probe/<class>/<number>.jpg       500 labelled images, 50 of each class, from the training split
    transfer/<number>.jpg          4,000 unlabelled images, from the rest of the training split
    test/<class>/<number>.jpg      1,000 labelled images, 100 of each class, from the test split

Images are drawn with a fixed seed and renumbered in the order drawn, so that a transfer image's
name says nothing about its class. The same source gives the same archive, byte for byte.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import tarfile
from pathlib import Path

SEED = 10
PROBE_PER_CLASS = 50
TEST_PER_CLASS = 100
TRANSFER = 4000


def read_jpegs(archive: Path) -> dict[str, dict[str, list[bytes]]]:
    """{split: {class: the JPEG files in the order of their names}}."""
    files: dict[str, dict[str, dict[str, bytes]]] = {"train": {}, "test": {}}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile():
                split, label, name = member.name.split("/")
                content = tar.extractfile(member)
                assert content is not None
                files[split].setdefault(label, {})[name] = content.read()
    return {
        split: {
            label: [named[n] for n in sorted(named)] for label, named in sorted(classes.items())
        }
        for split, classes in files.items()
    }


def choose(source: dict[str, dict[str, list[bytes]]], seed: int) -> dict[str, bytes]:
    """{path in the new archive: JPEG bytes}."""
    draw = random.Random(seed)
    chosen: dict[str, bytes] = {}
    rest: list[bytes] = []
    for label, jpegs in source["train"].items():
        order = draw.sample(jpegs, len(jpegs))
        for number, jpeg in enumerate(order[:PROBE_PER_CLASS]):
            chosen[f"probe/{label}/{number:03d}.jpg"] = jpeg
        rest += order[PROBE_PER_CLASS:]
    # Drawn from all classes together: like any unlabelled set, its classes are only about even.
    for number, jpeg in enumerate(draw.sample(rest, TRANSFER)):
        chosen[f"transfer/{number:04d}.jpg"] = jpeg
    for label, jpegs in source["test"].items():
        for number, jpeg in enumerate(draw.sample(jpegs, TEST_PER_CLASS)):
            chosen[f"test/{label}/{number:03d}.jpg"] = jpeg
    return chosen


def write_archive(files: dict[str, bytes], target: Path) -> None:
    """A tar.xz that depends on nothing but `files`: sorted names, no times, no owners."""
    partial = target.with_suffix(".partial")
    with tarfile.open(partial, "w:xz", format=tarfile.USTAR_FORMAT, preset=9) as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="cifar10.tar.xz: {train,test}/<class>/*.jpg")
    parser.add_argument(
        "--target", type=Path, default=Path(__file__).with_name("cifar10-mini.tar.xz")
    )
    arguments = parser.parse_args()
    files = choose(read_jpegs(arguments.source), SEED)
    write_archive(files, arguments.target)
    print(f"{arguments.target}: {len(files)} images, {arguments.target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
