"""The networks in examples/teachers in this process: the very graphs that a device runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge_teacher import bundle as bundles
from edge_teacher.keys import read_public

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "teachers"


class ExampleNetwork:
    """One bundle's graph on ONNX Runtime, one thread."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        graph = bundles.read(path, [read_public(path.with_name("owner.pub"))]).files["teacher.onnx"]
        self._session = onnxruntime.InferenceSession(graph, options)

    def run(self, images: NDArray[np.uint8], *outputs: str) -> list[NDArray[np.float32]]:
        """`features.last` [N, C, h, w] and `saliency` [N, S, S], those named and in that order."""
        found = self._session.run(list(outputs), {"images": images})
        return [np.asarray(each, np.float32) for each in found]


def example_bundles() -> list[Path]:
    """In the order of their numbers."""
    return sorted(FOLDER.glob("*.fedsa"))
