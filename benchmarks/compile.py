"""What compiling costs: from an ONNX file's bytes to a teacher's, for networks of real size.

    python -m benchmarks.compile [--rounds 3]

The weights are random. `seconds` is the fastest round of parsing, `build_teacher_graph` and serialising;
`growth` is what the teacher's file is larger by than the network's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import time
from collections.abc import Callable

import onnx
import torch
from torch import Tensor, nn

from benchmarks.saliency_nets import Classifier, conv
from export.graph import InputSpec, build_teacher_graph, find_logits, prepare
from export.graph.saliency import Kind
from export.inspect import candidates

SIDE = 224
SPEC = InputSpec(size=(SIDE, SIDE))
KINDS: tuple[Kind, ...] = ("gradcam", "input_gradient")
LIMITS = {"mobilenet_v2": 1.0, "resnet50": 10.0}
"""Seconds a compilation may take."""


class Bottleneck(nn.Module):
    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__()
        o = 4 * width
        self.body = nn.Sequential(
            conv(i, width, 1), conv(width, width, 3, stride), conv(width, o, 1, act=nn.Identity())
        )
        same = stride == 1 and i == o
        self.skip = nn.Identity() if same else conv(i, o, 1, stride, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Inverted(nn.Module):
    def __init__(self, i: int, o: int, stride: int, widening: int) -> None:
        super().__init__()
        h = i * widening
        parts = [conv(i, h, 1, act=nn.ReLU6())] if widening > 1 else []
        parts += [conv(h, h, 3, stride, nn.ReLU6(), h), conv(h, o, 1, act=nn.Identity())]
        self.body, self.same = nn.Sequential(*parts), stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


def resnet50() -> nn.Module:
    parts: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(depth):
            parts.append(Bottleneck(channels, width, stride if i == 0 else 1))
            channels = 4 * width
    return Classifier(*parts, channels=channels)


def mobilenet_v2() -> nn.Module:
    parts: list[nn.Module] = [conv(3, 32, 3, 2, nn.ReLU6())]
    channels = 32
    for widening, out, depth, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):  # fmt: skip
        for i in range(depth):
            parts.append(Inverted(channels, out, stride if i == 0 else 1, widening))
            channels = out
    return Classifier(*parts, conv(channels, 1280, 1, act=nn.ReLU6()), channels=1280)


NETS: dict[str, Callable[[], nn.Module]] = {"mobilenet_v2": mobilenet_v2, "resnet50": resnet50}


def file_of(net: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.onnx.export(
        net, (torch.randn(2, 3, SIDE, SIDE),), buffer, dynamo=False, opset_version=17,
        input_names=["x"], output_names=["scores"], dynamic_axes={"x": {0: "N"}, "scores": {0: "N"}},
    )  # fmt: skip
    return buffer.getvalue()


def compile_file(data: bytes, tap: str, kind: Kind) -> tuple[float, bytes]:
    """(seconds, the teacher's file)."""
    start = time.perf_counter()
    model = onnx.load_from_string(data)
    teacher = build_teacher_graph(model, SPEC, taps={"last": tap}, kind=kind).SerializeToString()
    return time.perf_counter() - start, teacher


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for name, make in NETS.items():
        torch.manual_seed(0)
        data = file_of(make().eval())
        network = prepare(onnx.load_from_string(data), SPEC)
        scores = find_logits(network, ["scores"])
        tap = candidates(network, scores, SPEC)[-1].tensor
        for kind in KINDS:
            runs = [compile_file(data, tap, kind) for _ in range(arguments.rounds)]
            seconds = min(took for took, _ in runs)
            cells.append(
                {
                    "net": name,
                    "kind": kind,
                    "megabytes": round(len(data) / 1e6, 1),
                    "seconds": round(seconds, 3),
                    "limit": LIMITS[name],
                    "growth": round(len(runs[0][1]) / len(data) - 1, 4),
                }
            )
            print(cells[-1], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cells": cells, "peak_megabytes": round(peak)}))


if __name__ == "__main__":
    main()
