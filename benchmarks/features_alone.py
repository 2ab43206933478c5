"""What features alone cost, over features and saliency in one pass: with the graph cut, and without.

    python -m benchmarks.features_alone [--rounds 15] [--batch 8]

`fetch` only asks for fewer outputs of the whole graph, `path` does so with ONNX Runtime's
only_execute_path_to_fetches, `cut` runs the graph that ends at the features. Everything takes turns, round
after round, on one thread, and ratios are of the fastest rounds in that thread's CPU time: what others on the
machine take is not counted. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.saliency_nets import NETS, SIZE, export_onnx
from edge_teacher import bundle as bundles
from edge_teacher.bundle import TeacherCard
from edge_teacher.keys import read_public
from edge_teacher.runtime.cut import cut, outputs_of
from export.graph import InputSpec, build_teacher_graph, find_logits, prepare
from export.inspect import candidates

TEACHERS = Path("examples/teachers")
SPEC = InputSpec(size=SIZE)
CELLS = (
    ("gradcam at the last tap", "gradcam", -1),
    ("gradcam halfway", "gradcam", None),
    ("input gradient", "input_gradient", -1),
)


def session(graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def ratios(graph: bytes, size: tuple[int, int], batch: int, rounds: int) -> dict[str, float]:
    outputs = outputs_of(graph)
    features = [next(name for name in outputs if name.startswith("features."))]
    feed = {"images": np.random.default_rng(0).integers(0, 256, (batch, *size, 3), np.uint8)}
    whole, part = session(graph), session(cut(graph, features))
    path = ort.RunOptions()
    path.only_execute_path_to_fetches = True
    tasks = {
        "both": lambda: whole.run(list(outputs), feed),
        "fetch": lambda: whole.run(features, feed),
        "path": lambda: whole.run(features, feed, path),
        "cut": lambda: part.run(features, feed),
    }
    found = dict.fromkeys(tasks, float("inf"))
    for _ in range(rounds):
        for name, task in tasks.items():
            started = time.thread_time()
            task()
            found[name] = min(found[name], time.thread_time() - started)
    return {name: round(found[name] / found["both"], 3) for name in ("fetch", "path", "cut")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, dict[str, float]] = {}

    def note(name: str, graph: bytes, size: tuple[int, int]) -> None:
        results[name] = ratios(graph, size, options.batch, options.rounds)
        print(f"{name:44} " + "  ".join(f"{k} {v:.3f}" for k, v in results[name].items()))

    owner = read_public(TEACHERS / "owner.pub")
    for path in sorted(TEACHERS.glob("*.fedsa"))[:2]:
        bundle = bundles.read(path, [owner])
        assert isinstance(bundle.card, TeacherCard)
        note(path.stem, bundle.file(bundle.card.graph), bundle.card.teacher.input_size)
    for name, make in NETS.items():
        model = export_onnx(make().eval())
        network = prepare(model, SPEC)
        taps = candidates(
            network, find_logits(network, [info.name for info in model.graph.output]), SPEC
        )
        for what, kind, place in CELLS:
            tap = taps[len(taps) // 2 if place is None else place].tensor
            graph = build_teacher_graph(model, SPEC, taps={"last": tap}, kind=kind)  # type: ignore[arg-type]
            note(f"{name}, {what}", graph.SerializeToString(), SIZE)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
