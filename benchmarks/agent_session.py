"""The bare session that the agent is measured against, as a process of its own.

python -m benchmarks.agent_session BUNDLE OWNER_KEY   answers one JSON line per line of its standard input
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from edge_teacher import bundle as bundles
from edge_teacher.bundle import TeacherCard
from edge_teacher.keys import read_public
from edge_teacher.memory import resident_bytes
from edge_teacher.runtime import OnnxRuntimeSession

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Bare:
    """Saliency and features of images it holds, without anything around."""

    def __init__(self, bundle: Path, owner: Path) -> None:
        read = bundles.read(bundle, [read_public(owner)])
        assert isinstance(read.card, TeacherCard)
        self._session = OnnxRuntimeSession(read.file(read.card.graph), threads=1)
        self._outputs = ["saliency", f"features.{read.card.teacher.saliency_tap}"]
        size = read.card.teacher.input_size
        rng = np.random.default_rng(0)
        self._images = rng.integers(0, 256, (max(BATCHES), *size, 3), np.uint8)

    def images(self, batch: int, seconds: float) -> tuple[int, float, float]:
        """(images, seconds, CPU seconds) of steps with so many images, for about so long."""
        done, cpu, began = 0, cpu_s(), time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            found = self._session.run(self._images[:batch], self._outputs)
            # As the agent does it: what is asked for is the mean over pixels.
            features = found[self._outputs[1]]
            n, channels, height, width = features.shape
            features.reshape(n * channels, -1) @ np.full(
                height * width, 1 / height / width, np.float32
            )
            done += batch
        return done, took, cpu_s() - cpu


def main() -> None:
    bare = Bare(Path(sys.argv[1]), Path(sys.argv[2]))
    for line in sys.stdin:
        asked = json.loads(line)
        images, seconds, cpu = bare.images(asked["batch"], asked["seconds"])
        told = {"images": images, "seconds": seconds, "cpu_s": cpu, "rss_bytes": resident_bytes()}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
