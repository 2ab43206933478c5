"""Is the derivative right? Judged per image against float64, on the owner's own network.

The judge is torch's autograd over an interpretation of the file (`autograd`), with the class chosen by the
same logits. Where the file has an operator that the interpreter lacks, directional differences through ONNX
Runtime take its place: coarser, and the report says so.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor

from edge_teacher.contract.errors import CheckFailed
from export.checks.autograd import KINKED, Anchors, UnknownOperator, evaluate
from export.graph.build import network_and_logits
from export.graph.emit import FLOATS, Ops, Value
from export.graph.gradient import gradients
from export.graph.network import Network, prune, session
from export.graph.target import Target, resolve, seed, settle
from export.graph.wrap import InputSpec

TOLERANCE = 1e-5
DIFFERENCE_TOLERANCE = 0.1  # a step that crosses a kink of the network costs some percent
BATCHES = (1, 2, 3, 17)
Floats = NDArray[np.float32]


class DerivativeReport(msgspec.Struct, frozen=True):
    """What the check found. Errors are relative, the worst over the images."""

    judge: Literal["float64 autograd", "directional differences"]
    images: int
    gradient_error: float
    logits_error: float | None
    """The worst deviation of the interpreter from ONNX Runtime, at the logits and wherever a branch is chosen;
    None where the interpreter was not used."""

    @property
    def passed(self) -> bool:
        limit = TOLERANCE if self.judge == "float64 autograd" else DIFFERENCE_TOLERANCE
        return self.gradient_error <= limit


class BatchReport(msgspec.Struct, frozen=True):
    """Whether an image's map depends on the image alone."""

    batches: tuple[int, ...]
    worst_difference: float
    """Largest difference of any map between batch sizes."""
    flat_maps: int
    maps_vary: bool
    """Different images have different maps."""


def check_derivative(
    model: onnx.ModelProto,
    spec: InputSpec,
    images: NDArray[np.uint8],
    *,
    wrt: str | None = None,
    logits: str | None = None,
    target: Target | None = None,
) -> DerivativeReport:
    """Compare d(scalar)/d(tensor) at the tensor `wrt` (default: the network's input) with the judge's.

    images: uint8[N, H, W, 3]. Raises UnsupportedNetwork as `build_teacher_graph` does.
    """
    target = target or Target()
    network, scores = network_and_logits(model, spec, [wrt] if wrt else [], logits)
    target = settle(network, scores, target)
    wrt = wrt or network.input_name
    x = network_input(spec, images)
    anchored = _anchored(network, scores)
    got, *held = _gradient(network, scores, wrt, target, x, anchored)
    anchors = Anchors({n: torch.from_numpy(v) for n, v in zip(anchored, held, strict=True)})
    try:
        exact = _by_autograd(network, scores, wrt, target, x, anchors)
    except UnknownOperator:
        error = _by_differences(network, scores, wrt, got, target, x)
        return DerivativeReport("directional differences", len(images), error, None)
    return DerivativeReport(
        "float64 autograd", len(images), relative_error(got, exact), anchors.worst
    )


def relative_error(got: NDArray[np.floating], exact: NDArray[np.floating]) -> float:
    """The worst image's |got - exact| / |exact|; an image whose exact value is zero counts its |got|."""
    off = np.linalg.norm((got - exact).reshape(len(got), -1), axis=1)
    size = np.linalg.norm(exact.reshape(len(got), -1), axis=1)
    return float(np.max(off / np.where(size > 0, size, 1.0)))


def network_input(spec: InputSpec, images: NDArray[np.uint8]) -> Floats:
    """What the preprocessing of a teacher hands to the network, computed by torch."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    if spec.channels == "BGR":
        x = x.flip(1)
    elif spec.channels == "grey":
        x = (x * torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype).view(1, 3, 1, 1)).sum(
            1, keepdim=True
        )
    x = torch.nn.functional.interpolate(x, spec.size, mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(n, dtype=x.dtype).view(1, -1, 1, 1) for n in (spec.mean, spec.std))
    x = (x * spec.scale - mean) / std
    return (x if spec.layout == "NCHW" else x.permute(0, 2, 3, 1)).float().contiguous().numpy()


def scalar(logits: Tensor, target: Target) -> Tensor:
    """The explained scalar of every image, [N]; see `export.graph.target` for the reductions."""
    form = resolve(tuple(logits.shape), target)
    y = logits.movedim(form.class_axis, 1).flatten(2) if logits.dim() > 2 else logits[:, :, None]
    given = form.class_index
    match form.reduction:
        case "max":
            flat = (y if given is None else y[:, given : given + 1]).flatten(1)
            return flat.max(1).values
        case "best_path":
            return (y.max(1).values if given is None else y[:, given]).mean(1)
        case _:
            means = y.mean(2)
            return means.max(1).values if given is None else means[:, given]


def check_batches(teacher: onnx.ModelProto, images: NDArray[np.uint8]) -> BatchReport:
    """Run a teacher graph at batch 1, 2, 3 and 17 and compare the maps of the same images."""
    runner = session(teacher)
    many = images[np.arange(max(BATCHES)) % len(images)]
    whole = runner.run(["saliency"], {"images": many})[0]
    worst = 0.0
    for batch in BATCHES[:-1]:
        part = runner.run(["saliency"], {"images": many[:batch]})[0]
        worst = max(worst, float(np.abs(part - whole[:batch]).max()))
    distinct = whole[: len(images)]
    flat = int(np.sum(np.ptp(distinct.reshape(len(distinct), -1), axis=1) == 0))
    vary = len(distinct) < 2 or bool(np.ptp(distinct, axis=0).max() > 0)
    return BatchReport(BATCHES, worst, flat, vary)


def require(derivative: DerivativeReport | None, batches: BatchReport) -> None:
    """Raises CheckFailed with a sentence if a teacher with these reports must not be shipped."""
    if derivative is not None and not derivative.passed:
        raise CheckFailed(
            f"the gradient differs from {derivative.judge} by {derivative.gradient_error:.1e} (relative, "
            f"worst of {derivative.images} images); please report the network's operators"
        )
    if batches.worst_difference > 1e-3:
        raise CheckFailed(
            f"a map changes by {batches.worst_difference:.1e} with the batch it is computed in: the "
            "network mixes the images of a batch; export it with a free batch axis, in evaluation mode"
        )
    if not batches.maps_vary:
        raise CheckFailed(
            "every image has the same saliency map; choose a tap that lies between the image and the logits"
        )


# -- ours, the judge's, and the stand-in ----------------------------------------------------------


def _anchored(network: Network, scores: str) -> list[str]:
    """The tensors on which branches are chosen: what `Anchors` hold. The logits choose the class."""
    before = network.ancestors([scores]) & network.descendants([network.input_name])
    names = [
        name
        for node in network.nodes
        if node.op_type in KINKED
        for name in node.input
        if name in before and name != network.input_name and network.has(name)
    ]
    return [n for n in dict.fromkeys([*names, scores]) if network.value(n).dtype in FLOATS]


def float32_branches(network: Network, scores: str, x: Tensor) -> Anchors:
    """What float32 computed wherever a branch is chosen on the way to `scores`, for the input `x`."""
    names = _anchored(network, scores)
    model = _model(network, Ops("check"), [network.value(name) for name in names])
    held = session(model).run(
        None, {network.input_name: _typed(network, x.detach().float().numpy())}
    )
    return Anchors({n: torch.from_numpy(v) for n, v in zip(names, held, strict=True)})


def _gradient(
    network: Network, scores: str, wrt: str, target: Target, x: Floats, also: list[str]
) -> list[Floats]:
    """The gradient at `wrt` by the rules, through ONNX Runtime, and the tensors `also`."""
    ops = Ops("check")
    start = seed(network, ops, scores, target)
    found = gradients(network, ops, {scores: start}, [wrt])[wrt]
    found = ops.expand(found, network.value(wrt))
    model = _model(network, ops, [found, *(network.value(name) for name in also)])
    results: list[Floats] = session(model).run(None, {network.input_name: _typed(network, x)})
    return results


def _by_autograd(
    network: Network, scores: str, wrt: str, target: Target, x: Floats, anchors: Anchors
) -> NDArray[np.float64]:
    feed = {network.input_name: torch.from_numpy(x)}
    values = evaluate(network.model, feed, [scores], leaves=[wrt], anchors=anchors)
    total = scalar(values[scores], target).sum()
    (gradient,) = torch.autograd.grad(total, values[wrt], allow_unused=True)
    exact = torch.zeros_like(values[wrt]) if gradient is None else gradient
    return exact.numpy()


def _by_differences(
    network: Network, scores: str, wrt: str, gradient: Floats, target: Target, x: Floats
) -> float:
    """| |g| - (y(t + h v) - y(t - h v)) / 2h | over |g|, v along g; the worst image."""
    feed = {network.input_name: _typed(network, x)}
    probe = onnx.ModelProto()
    probe.CopyFrom(network.model)
    if wrt != network.input_name:
        for node in probe.graph.node:
            for i, name in enumerate(node.output):
                if name == wrt:
                    node.output[i] = f"{wrt}/computed"
        probe.graph.input.append(helper.make_tensor_value_info(wrt, network.value(wrt).dtype, None))
        forward = onnx.ModelProto()
        forward.CopyFrom(network.model)
        feed[wrt] = _run(forward, {network.input_name: feed[network.input_name]}, wrt)
    clean = torch.from_numpy(_run(probe, feed, scores))
    fixed = _fixed_choice(clean, target)
    axes = tuple(range(1, gradient.ndim))
    size = np.sqrt((gradient.astype(np.float64) ** 2).sum(axes, keepdims=True))
    direction = gradient / np.where(size > 0, size, 1)
    point = feed[wrt]
    step = 2e-3 * np.sqrt((point.astype(np.float64) ** 2).mean(axes, keepdims=True))
    moved = []
    for sign in (1, -1):
        there = {**feed, wrt: (point + sign * step * direction).astype(point.dtype)}
        y = torch.from_numpy(_run(probe, there, scores))
        moved.append(np.asarray([float(scalar(y[i : i + 1], fixed[i])[0]) for i in range(len(y))]))
    slope = (moved[0] - moved[1]) / (2 * step.reshape(len(x)))
    length = size.reshape(len(x))
    return float(np.max(np.abs(slope - length) / np.where(length > 0, length, 1)))


def _fixed_choice(logits: Tensor, target: Target) -> list[Target]:
    """The target of every image with its class chosen, so that a step does not change the choice."""
    form = resolve(tuple(logits.shape), target)
    if form.class_index is not None or form.reduction in ("max", "best_path"):
        return [target] * len(logits)
    flat = logits.movedim(form.class_axis, 1).reshape(
        len(logits), logits.shape[form.class_axis], -1
    )
    return [
        Target(class_index=int(index), reduction=form.reduction, class_axis=form.class_axis)
        for index in flat.mean(2).argmax(1)
    ]


def _run(model: onnx.ModelProto, feed: dict[str, Floats], output: str) -> Floats:
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=output))
    prune(model.graph, [output])
    used = {name for node in model.graph.node for name in node.input}
    inputs = [info for info in model.graph.input if info.name in used]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    result: Floats = session(model).run(None, {k: v for k, v in feed.items() if k in used})[0]
    return result


def _typed(network: Network, x: Floats) -> Floats:
    dtype = helper.tensor_dtype_to_np_dtype(network.value(network.input_name).dtype)
    return x.astype(dtype)


def _model(network: Network, ops: Ops, outputs: list[Value]) -> onnx.ModelProto:
    graph = helper.make_graph(
        [*network.nodes, *ops.nodes],
        "derivative",
        network.model.graph.input,
        [helper.make_tensor_value_info(value.name, value.dtype, None) for value in outputs],
        [*network.model.graph.initializer, *ops.initializers.values()],
    )
    return helper.make_model(graph, opset_imports=network.model.opset_import, ir_version=8)
