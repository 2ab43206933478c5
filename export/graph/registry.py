"""The table of derivative rules, and what one rule is given.

A rule is a function registered for one or more operators. It receives a `Step`, reads the forward tensors and
the gradients of the outputs from it, and gives back one gradient per input that asks for one. `coverage()`
lists every operator with the module that covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from export.graph.emit import Ops, Value
from export.graph.errors import UnsupportedOperator
from export.graph.network import Network
from export.graph.shapes import ONE, describe

T = TypeVar("T")
Rule = Callable[["Step"], None]
_RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the derivative of these operators (ONNX default domain, opset 18)."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            if operator in _RULES:
                raise ValueError(f"operator {operator} has two rules")
            _RULES[operator] = function
        return function

    return register


def find(node: onnx.NodeProto) -> Rule | None:
    """The rule for this node's operator; None where there is none."""
    return _RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None


def coverage() -> dict[str, str]:
    """{operator: module of its rule}, sorted by module and operator."""
    table = {
        operator: function.__module__.rsplit(".", 1)[-1] for operator, function in _RULES.items()
    }
    return dict(sorted(table.items(), key=lambda item: (item[1], item[0])))


def label(node: onnx.NodeProto) -> str:
    """The name a user finds the node by."""
    return node.name or next((name for name in node.output if name), node.op_type)


@dataclass
class Step:
    """One node of the network, seen from the reverse pass.

    `active` names the tensors whose gradient is wanted. `give(i, g)` hands back the gradient of input i: it
    has the rank of that input, and along each axis the input's size or 1 (the same value all along).
    """

    node: onnx.NodeProto
    network: Network
    ops: Ops
    gradients: list[Value | None]
    active: frozenset[str]
    wanted: frozenset[str] = frozenset()
    """Of the active ones those that the caller asked for, whose gradients must be the exact ones."""
    given: list[tuple[str, Value]] = field(default_factory=list)

    # -- tensors ------------------------------------------------------------------------------

    def has(self, i: int) -> bool:
        return i < len(self.node.input) and bool(self.node.input[i])

    def x(self, i: int = 0) -> Value:
        return self.network.value(self.node.input[i])

    def y(self, i: int = 0) -> Value:
        return self.network.value(self.node.output[i])

    @property
    def dy(self) -> Value:
        """The gradient of the first output; a rule with several outputs reads `gradients`."""
        gradient = self.gradients[0]
        if gradient is None:
            self.refuse("only its secondary outputs are used")
        return gradient

    def full(self, axes: Iterable[int] | None = None) -> Value:
        """`dy` with every axis (or the given ones) at the output's own size."""
        return self.ops.expand(self.dy, self.y(), None if axes is None else list(axes))

    def wants(self, i: int = 0) -> bool:
        """Whether somebody asks for the gradient of input i (nobody does of an empty tensor)."""
        wanted = self.has(i) and self.node.input[i] in self.active
        return wanted and all(dim.size for dim in self.x(i).shape)

    def give(self, i: int, gradient: Value) -> None:
        target = self.x(i)
        fits = gradient.rank == target.rank and all(
            a in (ONE, b) for a, b in zip(gradient.shape, target.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"rule for {self.node.op_type} gave a gradient {describe(gradient.shape)} "
                f"for an input {describe(target.shape)}"
            )
        self.given.append((target.name, gradient))

    # -- constants and attributes -------------------------------------------------------------

    def constant(self, i: int) -> NDArray[np.generic] | None:
        """Input i as an array; None if it is absent."""
        if not self.has(i):
            return None
        array = self.network.constant(self.node.input[i])
        if array is None:
            self.refuse(f"its input {i} is computed from the image, and the rule needs a constant")
        return array

    def integers(self, i: int) -> list[int] | None:
        array = self.constant(i)
        return None if array is None else [int(number) for number in array.reshape(-1)]

    def attribute(self, name: str, default: T) -> T:
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                value = value.decode() if isinstance(value, bytes) else value
                return cast("T", list(value) if isinstance(default, list) else value)
        return default

    def refuse(self, reason: str) -> NoReturn:
        raise UnsupportedOperator(self.node.op_type, label(self.node), reason)
