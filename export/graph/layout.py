"""Where a tensor of a network has its channels and pixels: by what made it, then by its shape."""

from __future__ import annotations

from export.graph.errors import UnsupportedNetwork
from export.graph.network import Network
from export.graph.saliency import MapLayout, infer_layout

_CHANNELS_FIRST = {
    *("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
    *("BatchNormalization", "InstanceNormalization", "LRN"),
}
"""ONNX defines these for [N, C, h, w] only."""
_KEEPS_LAYOUT = {
    *(
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Selu",
        "Celu",
        "Clip",
        "HardSwish",
        "HardSigmoid",
        "Mish",
    ),
    *(
        "Sigmoid",
        "Tanh",
        "Erf",
        "Softplus",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Identity",
        "Cast",
        "Dropout",
    ),
    *("Pad", "Concat", "Resize"),
}


def layout_of(network: Network, tensor: str, image: tuple[int, int]) -> MapLayout:
    """The layout of a tap in a network with an image of (H, W).

    Raises UnsupportedNetwork if nothing fits, also for a sequence that was never a grid of tokens.
    """
    shape = network.value(tensor).shape
    if len(shape) == 4 and _channels_first(network, tensor):
        return MapLayout("NCHW", (shape[2].size, shape[3].size))
    layout = infer_layout(shape, tensor, image)
    if layout.axes == "NTC" and layout.size not in _grids(network, tensor):
        raise UnsupportedNetwork(
            f"tap {tensor!r} could be tokens of {layout.size[0]} x {layout.size[1]}, but nothing before it "
            "is a map of that size: it is no grid; if it is, say so with `layout`"
        )
    return layout


def _channels_first(network: Network, tensor: str) -> bool:
    """Whether an operator that knows no other layout made it, give or take arithmetic on it."""
    while (node := network.producer.get(tensor)) is not None:
        if node.op_type in _CHANNELS_FIRST:
            return True
        if node.op_type not in _KEEPS_LAYOUT:
            return False
        maps = [n for n in node.input if n in network.values and network.values[n].rank == 4]
        tensor = next((n for n in maps if n in network.producer), "")
    return False


def _grids(network: Network, tensor: str) -> set[tuple[int, int]]:
    """Neighbouring sizes of every map that `tensor` is computed from."""
    return {
        (a.size, b.size)
        for name in network.ancestors([tensor])
        if name in network.values and network.values[name].rank > 3
        for a, b in zip(
            network.values[name].shape[1:], network.values[name].shape[2:], strict=False
        )
    }
