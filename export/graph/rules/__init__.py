"""The derivative rules, one module per operator family. Importing this package registers them all."""

from export.graph.rules import (
    activation,
    arithmetic,
    convolution,
    layout,
    linear,
    normalisation,
    pooling,
    reduction,
    resize,
    selection,
)

__all__ = [
    "activation",
    "arithmetic",
    "convolution",
    "layout",
    "linear",
    "normalisation",
    "pooling",
    "reduction",
    "resize",
    "selection",
]
