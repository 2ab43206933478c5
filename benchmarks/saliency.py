"""What saliency costs: the teacher's graph against its plain forward and against torch eager, on one thread.

    python -m benchmarks.saliency [--rounds 15] [--only residual vit]

Every cell times three things in turn, round after round, and reports ratios of their fastest rounds: a
busy machine only ever adds time. `vs_forward` is teacher graph over the plain ONNX forward; `vs_torch`
is teacher graph over torch eager forward and backward to the same map (below 1: faster than torch). The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks.saliency_nets import NETS, SIZE, export_onnx
from export.checks.parity import relative_error
from export.graph import InputSpec, build_teacher_graph, prepare
from export.graph.network import Network, prune, session
from export.graph.saliency import Kind

BATCHES = (1, 32)
KINDS: tuple[Kind, ...] = ("gradcam", "input_gradient")
SPEC = InputSpec(size=SIZE)


def torch_map(net: nn.Module, images: Tensor, kind: Kind) -> Tensor:
    """The same map as the teacher graph gives, by eager forward and backward."""
    x = images.permute(0, 3, 1, 2).to(next(net.parameters()).dtype) / 255
    kept: list[Tensor] = []
    if kind == "input_gradient":
        x.requires_grad_(True)
        y = net(x)
        leaf = x
    else:
        # the backward pass stops at the tap: what lies before it is run without a graph
        hook = net.tap.register_forward_hook(
            lambda module, args, out: kept.append(out.detach().requires_grad_(True)) or kept[0]
        )
        y = net(x)
        hook.remove()
        leaf = kept[0]
    score = y.mean((2, 3)) if y.dim() == 4 else y
    (gradient,) = torch.autograd.grad(score.max(1).values.sum(), leaf)
    by_input = kind == "input_gradient"
    maps = gradient.abs().amax(1) if by_input else _cam(leaf.detach(), gradient)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1.0)


def _cam(tap: Tensor, gradient: Tensor) -> Tensor:
    if tap.dim() == 3:  # tokens, the class token first
        side = int((tap.shape[1] - 1) ** 0.5)
        tap, gradient = (
            t[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for t in (tap, gradient)
        )
    return (gradient.mean((2, 3), keepdim=True) * tap).sum(1).relu()


def interleaved(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Fewest seconds of each task, the tasks taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in seconds.items()}


def find_tap(network: Network, net: nn.Module, x: Tensor) -> str:
    """The tensor of the ONNX network that holds what `net.tap` puts out."""
    kept: list[Tensor] = []
    hook = net.tap.register_forward_hook(lambda module, args, out: kept.append(out.detach()))
    with torch.no_grad():
        net(x)
    hook.remove()
    names = [n for node in network.nodes for n in node.output if n in network.values]
    probe = copy.deepcopy(network.model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    for name, value in zip(
        names, session(probe).run(names, {network.input_name: x.numpy()}), strict=True
    ):
        wanted = kept[0].numpy()
        near = 1e-4 * np.abs(wanted).max()  # of untrained weights some activations are all but zero
        if value.shape == wanted.shape and np.abs(value - wanted).max() < near:
            return name
    raise RuntimeError("no tensor of the network is the tap")


def forward_only(model: onnx.ModelProto, tap: str) -> onnx.ModelProto:
    """Images to features and logits: the teacher without its saliency."""
    teacher = build_teacher_graph(model, SPEC, taps={"last": tap}, publish_logits=True)
    kept = [info for info in teacher.graph.output if info.name != "saliency"]
    del teacher.graph.output[:]
    teacher.graph.output.extend(kept)
    prune(teacher.graph, [info.name for info in kept])
    return teacher


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=sorted(NETS), default=sorted(NETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    worst = 0.0
    print(
        f"{'net':<14}{'kind':<16}{'batch':>5}{'forward':>10}{'teacher':>10}{'torch':>10}"
        f"{'vs fwd':>8}{'vs torch':>9}"
    )
    for name in arguments.only:
        torch.manual_seed(0)
        net = NETS[name]().eval()
        model = export_onnx(net)
        network = prepare(model, SPEC)
        images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), *SIZE, 3), dtype=np.uint8)
        pixels = torch.from_numpy(images)
        tap = find_tap(network, net, pixels[:2].permute(0, 3, 1, 2).float() / 255)
        plain = session(forward_only(model, tap))
        double = copy.deepcopy(net).double()
        for kind in KINDS:
            taps = {"last": tap} if kind == "gradcam" else {}
            teacher = session(build_teacher_graph(model, SPEC, taps=taps, kind=kind))
            exact = torch_map(double, pixels[:4], kind).numpy()
            got = teacher.run(["saliency"], {"images": images[:4]})[0]
            worst = max(worst, relative_error(got, exact))
            for batch in BATCHES:
                feed, some = {"images": images[:batch]}, pixels[:batch]
                took = interleaved(
                    {
                        "forward": partial(plain.run, None, feed),
                        "teacher": partial(teacher.run, None, feed),
                        "torch": partial(torch_map, net, some, kind),
                    },
                    arguments.rounds,
                )
                cell = {
                    "net": name,
                    "kind": kind,
                    "batch": batch,
                    "vs_forward": round(took["teacher"] / took["forward"], 3),
                    "vs_torch": round(took["teacher"] / took["torch"], 3),
                }
                cells.append(cell)
                milliseconds = "".join(
                    f"{1000 * took[k]:>10.2f}" for k in ("forward", "teacher", "torch")
                )
                print(
                    f"{name:<14}{kind:<16}{batch:>5}{milliseconds}{cell['vs_forward']:>8}{cell['vs_torch']:>9}",
                    flush=True,
                )
    print(json.dumps({"cells": cells, "worst_relative_error": worst}))


if __name__ == "__main__":
    main()
