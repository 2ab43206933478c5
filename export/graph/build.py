"""The teacher graph: preprocessing, the network, its derivative and the saliency map in one ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from export.graph.emit import Ops, Value
from export.graph.errors import UnsupportedNetwork, UnsupportedOperator
from export.graph.gradient import gradients
from export.graph.layout import layout_of
from export.graph.network import Network, prune
from export.graph.opset import IR_VERSION, TARGET
from export.graph.prepare import prepare
from export.graph.saliency import (
    Kind,
    MapLayout,
    eigen_cam,
    feature_map,
    grad_cam,
    of_input,
)
from export.graph.target import Target, find_logits, seed
from export.graph.wrap import InputSpec, images_info, preprocess


def build_teacher_graph(
    model: onnx.ModelProto,
    spec: InputSpec,
    *,
    taps: Mapping[str, str],
    saliency_tap: str | None = None,
    logits: str | None = None,
    publish_logits: bool = False,
    kind: Kind = "gradcam",
    target: Target | None = None,
    layout: MapLayout | None = None,
) -> onnx.ModelProto:
    """A teacher of opset 18: `images: uint8[N, H, W, 3]`, any N, H, W, to features and saliency.

    taps maps a tap's name to the tensor of the network it names. `saliency_tap` is the one Grad-CAM and
    Eigen-CAM look at (default: the only one); the gradient kinds look at the network's input and need none.
    `logits` names the class scores (default: found, see `find_logits`), `target` the scalar that is explained,
    `layout` where the saliency tap has channels and pixels (default: inferred, see `infer_layout`).

    Outputs: `features.<tap>: [N, C, h, w]`, tokens and channels-last maps transposed to it; `saliency:
    float32[N, h, w]` in [0, 1] at the resolution of the tap (of the network's input for the gradient kinds);
    `logits` only if `publish_logits`.

    Raises UnsupportedNetwork, and UnsupportedOperator where a derivative is needed through a node without a
    rule.
    """
    needs_logits = kind != "eigencam" or publish_logits
    network, scores = network_and_logits(
        model, spec, list(taps.values()), logits, needed=needs_logits
    )
    return teacher_of(
        network,
        spec,
        taps=taps,
        saliency_tap=saliency_tap,
        scores=scores,
        publish_logits=publish_logits,
        kind=kind,
        target=target,
        layout=layout,
    )


def teacher_of(
    network: Network,
    spec: InputSpec,
    *,
    taps: Mapping[str, str],
    scores: str,
    saliency_tap: str | None = None,
    publish_logits: bool = False,
    kind: Kind = "gradcam",
    target: Target | None = None,
    layout: MapLayout | None = None,
) -> onnx.ModelProto:
    """`build_teacher_graph` for a network that is measured already; `scores` names its logits."""
    ops = Ops("saliency")
    tapped = (
        _saliency_tensor(taps, saliency_tap)
        if kind in ("gradcam", "eigencam")
        else network.input_name
    )
    saliency = _saliency(network, ops, kind, tapped, scores, target or Target(), layout, spec)
    published = {}
    for name, tensor in taps.items():
        value = network.value(tensor)
        given = layout if tensor == tapped else None
        where = given or layout_of(network, tensor, spec.size)
        published[f"features.{name}"] = feature_map(ops, value, where)
    published["saliency"] = saliency
    if publish_logits and scores:
        published["logits"] = network.value(scores)
    return _assemble(network, ops, spec, published)


def network_and_logits(
    model: onnx.ModelProto,
    spec: InputSpec,
    tensors: Sequence[str],
    logits: str | None,
    *,
    needed: bool = True,
) -> tuple[Network, str]:
    """The measured network, pruned to `tensors` and its logits, and the logits' name ("" if not needed)."""
    if logits:
        return prepare(model, spec, keep=[*tensors, logits]), logits
    if not needed:
        return prepare(model, spec, keep=tensors), ""
    outputs = [info.name for info in model.graph.output]
    network = prepare(model, spec, keep=[*tensors, *outputs])
    return network, find_logits(network, outputs)


def _saliency_tensor(taps: Mapping[str, str], saliency_tap: str | None) -> str:
    if saliency_tap is None:
        if len(taps) != 1:
            raise UnsupportedNetwork(
                f"say which of the taps {sorted(taps)} the saliency map is taken at"
            )
        return next(iter(taps.values()))
    if saliency_tap not in taps:
        raise UnsupportedNetwork(
            f"the saliency tap {saliency_tap!r} is none of the taps {sorted(taps)}"
        )
    return taps[saliency_tap]


def _saliency(
    network: Network,
    ops: Ops,
    kind: Kind,
    tapped: str,
    scores: str,
    target: Target,
    layout: MapLayout | None,
    spec: InputSpec,
) -> Value:
    x = network.value(tapped)
    if kind in ("gradcam", "eigencam"):
        layout = layout or layout_of(network, tapped, spec.size)
    if kind == "eigencam" and layout:
        return eigen_cam(ops, x, layout)
    if tapped not in network.ancestors([scores]):
        raise UnsupportedNetwork(
            f"the logits {scores!r} are not computed from tap {tapped!r}; tap a tensor before them"
        )
    start = seed(network, ops, scores, target)
    try:
        gradient = gradients(network, ops, {scores: start}, [tapped])[tapped]
    except UnsupportedOperator as refusal:
        raise refusal.with_nearest(nearest_tap(network, scores, spec.size, refusal.node)) from None
    if layout:
        return grad_cam(ops, x, gradient, layout)
    return of_input(ops, x, gradient, kind, 1 if spec.layout == "NCHW" else 3)


def nearest_tap(network: Network, scores: str, image: tuple[int, int], after: str) -> str | None:
    """The earliest feature map (or tokens) after node `after` from which the gradient of the logits exists."""
    nodes = network.nodes
    position = next((i for i, node in enumerate(nodes) if after in (node.name, *node.output)), 0)
    before_scores = network.ancestors([scores])
    for node in nodes[position + 1 :]:
        for name in node.output:
            if name not in before_scores or name == scores or name not in network.values:
                continue
            if not _is_map(network, name, image):
                continue
            trial = Ops("trial")
            try:
                gradients(network, trial, {scores: network.value(scores)}, [name])
            except UnsupportedNetwork:
                continue
            return str(name)
    return None


def _is_map(network: Network, name: str, image: tuple[int, int]) -> bool:
    if network.value(name).rank not in (3, 4):
        return False
    try:
        layout = layout_of(network, name, image)
    except UnsupportedNetwork:
        return False
    return min(layout.size) > 1


def _assemble(
    network: Network, ops: Ops, spec: InputSpec, published: Mapping[str, Value]
) -> onnx.ModelProto:
    """One graph from `images` to the published names, nodes in order, nothing that no output needs."""
    front = Ops("images")
    x = preprocess(front, spec, network.value(network.input_name).dtype)
    renamed = {network.input_name: x.name}
    extra: list[onnx.NodeProto] = []
    for public, value in published.items():
        if value.name in renamed:
            extra.append(helper.make_node("Identity", [renamed[value.name]], [public], name=public))
        else:
            renamed[value.name] = public
    reserved = {"images", *published}
    for node in network.nodes:
        for name in node.output:
            if name in reserved and name not in renamed:
                renamed[name] = f"network/{name}"
    initializers = [*network.model.graph.initializer]
    initializers += [*front.initializers.values(), *ops.initializers.values()]
    graph = helper.make_graph(
        [*front.nodes, *(_rename(node, renamed) for node in [*network.nodes, *ops.nodes]), *extra],
        "teacher",
        [images_info()],
        [
            helper.make_tensor_value_info(
                name,
                TensorProto.FLOAT if name == "saliency" else value.dtype,
                [
                    "N" if dim.batched and dim.size == 1 else None if dim.batched else dim.size
                    for dim in value.shape
                ],
            )
            for name, value in published.items()
        ],
        initializers,
    )
    prune(graph, published)
    imports = [helper.make_opsetid("", TARGET)]
    imports += [
        entry for entry in network.model.opset_import if entry.domain not in {"", "ai.onnx"}
    ]
    return helper.make_model(
        graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="fedsa-edge"
    )


def _rename(node: onnx.NodeProto, renamed: Mapping[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for names in (copy.input, copy.output):
        for i, name in enumerate(names):
            if name in renamed:
                names[i] = renamed[name]
    for attribute in copy.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = [_rename(child, renamed) for child in attribute.g.node]
            del attribute.g.node[:]
            attribute.g.node.extend(inner)
    return copy
