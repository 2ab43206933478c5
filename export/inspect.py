"""What is in an ONNX file, and what teacher could be made of it: `fedsa export inspect MODEL.onnx`."""

from __future__ import annotations

from math import prod
from pathlib import Path
from shlex import quote
from typing import Literal

import msgspec
import numpy as np
import onnx
from onnx import TensorProto

from export.checks.tensorrt import TensorRtVerdict, check_tensorrt, installed_tensorrt
from export.graph import InputSpec, UnsupportedNetwork, find_logits, prepare
from export.graph.build import teacher_of
from export.graph.emit import FLOATS
from export.graph.layout import layout_of
from export.graph.network import Network, pixel_dependent, session
from export.graph.opset import to_opset18
from export.graph.prepare import image_input
from export.graph.registry import find, label

DEFAULT_SIZE = 224  # where the file leaves the image size free
_OTHER_SIZES = ((48, 192), (32, 128), (320, 320), (640, 640))  # text lines, detectors
_TRIALS = 16  # taps tried, from the logits backwards, until one has a map that is not flat


class TensorInfo(msgspec.Struct, frozen=True):
    """An input or output: its element type, and sizes per axis (None: free)."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class TapCandidate(msgspec.Struct, frozen=True):
    """A tensor the whole network passes through: tapping it loses nothing."""

    tensor: str
    op: str
    shape: tuple[int, ...]
    """Without the batch."""
    layout: Literal["NCHW", "NHWC", "NTC"]
    map_size: tuple[int, int]
    stage: int
    """Counts resolutions from the image on; one stage's maps have one size, give or take padding."""


class MissingRule(msgspec.Struct, frozen=True):
    op: str
    count: int
    first_node: str


class Inspection(msgspec.Struct, frozen=True):
    """Everything `fedsa export inspect` shows; `--json` is this struct."""

    path: str
    producer: str
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    assumed: InputSpec
    parameters: int
    macs: int
    """Multiply-accumulates of one image: convolutions and matrix products."""
    logits: str | None
    logits_shape: tuple[int, ...] | None
    taps: tuple[TapCandidate, ...]
    suggested_tap: str | None
    without_rule: tuple[MissingRule, ...]
    """Operators between the image and the logits that have no derivative rule."""
    tensorrt: TensorRtVerdict
    problem: str | None
    """Why no teacher with Grad-CAM can be made; None if one can."""
    command: str


def inspect(path: Path, spec: InputSpec | None = None) -> Inspection:
    """Look at an ONNX file. `spec` says how it wants its images (default: guessed, see `guess_spec`).

    Raises UnsupportedNetwork for a file no teacher can be made of at all: no image input, several inputs, a
    network that does not run.
    """
    model = load(path)
    spec, network = (spec, prepare(model, spec)) if spec else _first_that_runs(model)
    outputs = [info.name for info in network.model.graph.output]
    logits, problem = None, None
    try:
        logits = find_logits(network, outputs)
    except UnsupportedNetwork as error:
        problem = str(error)
    taps = candidates(network, logits or outputs[0], spec)
    suggested, teacher = None, None
    if logits:
        suggested, teacher, problem = suggest(network, spec, taps, logits)
    return Inspection(
        path=str(path),
        producer=f"{model.producer_name} {model.producer_version}".strip() or "unknown",
        opset=next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0),
        inputs=tuple(_info(info) for info in model.graph.input if info.name == network.input_name),
        outputs=tuple(_info(info) for info in model.graph.output),
        assumed=spec,
        parameters=count_parameters(network),
        macs=count_macs(network),
        logits=logits,
        logits_shape=tuple(d.size for d in network.value(logits).shape[1:]) if logits else None,
        taps=taps,
        suggested_tap=suggested,
        without_rule=missing_rules(network, logits or outputs[0]),
        tensorrt=_ask_tensorrt(teacher, spec),
        problem=problem,
        command=_command(path, spec, suggested, taps),
    )


def load(path: Path) -> onnx.ModelProto:
    """Raises UnsupportedNetwork if the file is missing or not an ONNX model."""
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except FileNotFoundError as error:
        raise UnsupportedNetwork(
            f"{path}: no such file, or a weight file beside it is missing"
        ) from error
    except Exception as error:  # protobuf and the checker raise types of their own
        said = str(error).strip().splitlines() or ["unreadable"]
        raise UnsupportedNetwork(f"{path} is not a valid ONNX model: {said[0]}") from error
    return model


def guess_spec(model: onnx.ModelProto) -> InputSpec:
    """Size, layout and planes as far as the file says them; mean and std it cannot say: 0-1 is assumed.

    A uint8 input is taken to want 0-255. Raises UnsupportedNetwork if there is no single image input.
    """
    image = image_input(to_opset18(model).graph)
    sizes = [dim.dim_value or None for dim in image.type.tensor_type.shape.dim]
    channels_last = sizes[3] in (1, 3) and sizes[1] not in (1, 3)
    planes = sizes[3] if channels_last else sizes[1]
    height, width = (sizes[1], sizes[2]) if channels_last else (sizes[2], sizes[3])
    if planes not in (1, 3, None):
        raise UnsupportedNetwork(
            f"input {image.name!r} has {planes} planes; an image has 3, or 1 if it is grey"
        )
    raw = image.type.tensor_type.elem_type == TensorProto.UINT8
    return InputSpec(
        size=(height or DEFAULT_SIZE, width or DEFAULT_SIZE),
        layout="NHWC" if channels_last else "NCHW",
        channels="grey" if planes == 1 else "RGB",
        scale=1.0 if raw else 1 / 255,
    )


def _first_that_runs(model: onnx.ModelProto) -> tuple[InputSpec, Network]:
    """The guessed spec and the measured network; where the file leaves the size free, the first size that runs.

    Raises UnsupportedNetwork, in the words of the first size, if none does.
    """
    guess = guess_spec(model)
    sizes = image_input(to_opset18(model).graph).type.tensor_type.shape.dim
    refusal: UnsupportedNetwork | None = None
    for height, width in ((DEFAULT_SIZE, DEFAULT_SIZE), *_OTHER_SIZES):
        place = 2 if guess.layout == "NCHW" else 1
        said = sizes[place].dim_value or height, sizes[place + 1].dim_value or width
        spec = msgspec.structs.replace(guess, size=said)
        try:
            return spec, prepare(model, spec)
        except UnsupportedNetwork as error:
            refusal = refusal or error
        if said == guess.size and all(sizes[place + i].dim_value for i in (0, 1)):
            break
    raise refusal or UnsupportedNetwork("the network has no image size")


def candidates(network: Network, logits: str, spec: InputSpec) -> tuple[TapCandidate, ...]:
    """Feature maps and token tensors that every path from the image to the logits passes through, in order."""
    between = _between(network, logits)
    last_use: dict[str, int] = {}
    for i, node in enumerate(network.nodes):
        for name in node.input:
            if name in between:
                last_use[name] = i
    found: list[TapCandidate] = []
    live: set[str] = set()
    sizes: list[tuple[int, int]] = []
    for i, node in enumerate(network.nodes):
        live = {name for name in live if last_use.get(name, -1) > i}
        live |= {name for name in node.output if name in between and last_use.get(name, -1) > i}
        fresh = [name for name in node.output if name in live]
        if len(live) != 1 or not fresh:
            continue
        name = fresh[0]
        shape = network.value(name).shape if network.has(name) else ()
        if len(shape) not in (3, 4) or name == logits:
            continue
        try:
            layout = layout_of(network, name, spec.size)
        except UnsupportedNetwork:
            continue
        if min(layout.size) < 2:
            continue
        if not sizes or _another_stage(sizes[-1], layout.size):
            sizes.append(layout.size)
        plain = tuple(dim.size for dim in shape[1:])
        found.append(TapCandidate(name, node.op_type, plain, layout.axes, layout.size, len(sizes)))
    return tuple(found)


def _another_stage(before: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a map has another resolution; the pixels that padding adds for a moment are none."""
    small, large = sorted((prod(before), prod(size)))
    return large >= 2 * small


def _between(network: Network, logits: str) -> set[str]:
    """Tensors that carry pixels, and not only sizes, from the image to the logits."""
    carried = pixel_dependent(network.model.graph, network.input_name)
    return network.ancestors([logits]) & carried


def suggest(
    network: Network, spec: InputSpec, taps: tuple[TapCandidate, ...], logits: str
) -> tuple[str | None, onnx.ModelProto | None, str | None]:
    """(tap, its teacher, why there is none): the last tap from which Grad-CAM works and whose map is not flat.

    The last one before a classifier's pooling; before a dense head the last of the smallest maps, because the
    ones beside the head say little more than the head itself.
    """
    problem: str | None = "no tensor that could be tapped lies between the image and the logits"
    noise = np.random.default_rng(0).integers(0, 256, (2, *spec.size, 3), dtype=np.uint8)
    ordered = list(reversed(taps))
    if sum(dim.size > 1 for dim in network.value(logits).shape[1:]) > 1:
        ordered.sort(key=lambda tap: tap.map_size[0] * tap.map_size[1])
    for tap in ordered[:_TRIALS]:
        try:
            teacher = teacher_of(network, spec, taps={"last": tap.tensor}, scores=logits)
        except UnsupportedNetwork as refusal:
            return None, None, str(refusal)
        (maps,) = session(teacher).run(["saliency"], {"images": noise})
        if np.ptp(maps) > 0:
            return tap.tensor, teacher, None
        problem = f"the saliency maps at the last {_TRIALS} taps are flat; name an earlier one"
    return None, None, problem


def missing_rules(network: Network, logits: str) -> tuple[MissingRule, ...]:
    """Operators on paths from the image to the logits that no derivative rule covers."""
    between = _between(network, logits)
    counted: dict[str, list[str]] = {}
    for node in network.nodes:
        on_path = any(name in between for name in node.output) and any(
            name in between for name in node.input
        )
        if on_path and find(node) is None:
            counted.setdefault(node.op_type, []).append(label(node))
    return tuple(MissingRule(op, len(nodes), nodes[0]) for op, nodes in counted.items())


def count_parameters(network: Network) -> int:
    """Numbers that pixels meet on their way: floating-point tensors that do not depend on them, each once."""
    reached = network.descendants([network.input_name])
    read = {
        name
        for node in network.nodes
        if reached.intersection(node.output)
        for name in node.input
        if name and name not in reached and network.has(name)
    }
    values = [network.value(name) for name in read]
    return sum(
        int(np.prod([dim.size for dim in value.shape]))
        for value in values
        if value.dtype in FLOATS and value.rank
    )


def count_macs(network: Network) -> int:
    """Multiply-accumulates of one image in Conv, ConvTranspose, Gemm and MatMul."""
    total = 0
    for node in network.nodes:
        if not node.output or not network.has(node.output[0]):
            continue
        if node.op_type not in {"Conv", "ConvTranspose", "Gemm", "MatMul"}:
            continue
        x, w, y = (
            network.value(name).shape for name in (node.input[0], node.input[1], node.output[0])
        )
        out = int(np.prod([dim.size for dim in y]))
        if node.op_type == "Conv":
            total += out * int(np.prod([dim.size for dim in w[1:]]))
        elif node.op_type == "ConvTranspose":
            total += int(np.prod([dim.size for dim in x])) * int(
                np.prod([dim.size for dim in w[1:]])
            )
        else:
            total += out * x[-1].size
    return total


def _ask_tensorrt(teacher: onnx.ModelProto | None, spec: InputSpec) -> TensorRtVerdict:
    if teacher is None:
        return TensorRtVerdict(False, None, None, "not checked: there is no teacher graph to check")
    return check_tensorrt(
        teacher.SerializeToString(), {"images": (8, *spec.size, 3)}, installed_tensorrt()
    )


def _info(info: onnx.ValueInfoProto) -> TensorInfo:
    tensor = info.type.tensor_type
    shape = tuple(dim.dim_value or dim.dim_param or None for dim in tensor.shape.dim)
    return TensorInfo(info.name, TensorProto.DataType.Name(tensor.elem_type).lower(), shape)


def _command(path: Path, spec: InputSpec, tap: str | None, taps: tuple[TapCandidate, ...]) -> str:
    chosen = tap or (taps[-1].tensor if taps else "TENSOR")
    height, width = spec.size
    parts = [
        f"fedsa export teacher --onnx {quote(str(path))}",
        f"--size {height}x{width}",
        f"--tap {quote(f'last={chosen}')}",
    ]
    if spec.layout != "NCHW":
        parts.append(f"--layout {spec.layout}")
    if spec.channels != "RGB":
        parts.append(f"--channels {spec.channels}")
    if tap is None:
        parts.append("--kind eigencam")
    return " ".join([*parts, "--signing-key owner.key", f"--out {quote(path.stem + '.fedsa')}"])


def render(found: Inspection) -> str:
    """The inspection as text for a terminal."""
    lines = [f"{found.path}: opset {found.opset}, made by {found.producer}"]
    lines += [f"  input   {_tensor(info)}" for info in found.inputs]
    lines += [f"  output  {_tensor(info)}" for info in found.outputs]
    spec = found.assumed
    lines.append(
        f"  images  {spec.size[0]} x {spec.size[1]}, {spec.layout}, {spec.channels}, mean {list(spec.mean)}, "
        f"std {list(spec.std)}, scale {spec.scale:.4g} (mean and std are not in the file: check them)"
    )
    lines.append(
        f"  cost    {found.parameters / 1e6:.2f} M parameters, {found.macs / 1e6:.1f} M MACs per image"
    )
    shape = list(found.logits_shape or ())
    lines.append(f"  logits  {found.logits} {shape}" if found.logits else "  logits  not found")
    if found.taps:
        width = max(len(tap.tensor) for tap in found.taps)
        lines.append("  taps    (* suggested)")
        for tap in found.taps:
            mark = "*" if tap.tensor == found.suggested_tap else " "
            size = f"{tap.map_size[0]}x{tap.map_size[1]}"
            place = f"stage {tap.stage}  {size:>9}  {tap.layout} {list(tap.shape)}  {tap.op}"
            lines.append(f"        {mark} {tap.tensor:<{width}}  {place}")
    for missing in found.without_rule:
        lines.append(f"  no rule {missing.op} ({missing.count}x, first at {missing.first_node})")
    lines.append(f"  tensorrt  {found.tensorrt.detail}")
    if found.problem:
        lines.append(f"  problem {found.problem}")
    lines.append(f"  run     {found.command}")
    return "\n".join(lines)


def _tensor(info: TensorInfo) -> str:
    sizes = ", ".join("?" if size is None else str(size) for size in info.shape)
    return f"{info.name}: {info.dtype}[{sizes}]"
