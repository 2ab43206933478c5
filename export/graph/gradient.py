"""The reverse pass: from a seed on one tensor back to the gradients of others.

For y = f(x), the chain rule hands each node the gradient of its outputs and asks its rule for those of its
inputs; a tensor read more than once sums what comes back. Only nodes on a path from a wanted tensor to the
seeded one are visited, so nothing before a tap is differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from export.graph import rules as _rules  # noqa: F401  (importing registers the rules)
from export.graph.emit import FLOATS, Ops, Value
from export.graph.errors import UnsupportedOperator
from export.graph.network import Network, reads_numbers
from export.graph.registry import Step, find, label


def gradients(
    network: Network, ops: Ops, seeds: Mapping[str, Value], wanted: Sequence[str]
) -> dict[str, Value]:
    """Gradients of sum(seed * tensor) over `seeds`, with respect to each wanted tensor.

    seeds maps a tensor's name to dL/dtensor, possibly under-broadcast; the result may be under-broadcast too. A
    wanted tensor that no seed depends on gets zero. Raises UnsupportedOperator.
    """
    active = _active(network, seeds, wanted)
    pending: dict[str, list[Value]] = {name: [seed] for name, seed in seeds.items()}
    totals: dict[str, Value] = {}
    for node in reversed(network.nodes):
        arriving = [_total(ops, pending, name) for name in node.output]
        totals.update(
            (name, gradient)
            for name, gradient in zip(node.output, arriving, strict=True)
            if gradient and name in wanted
        )
        if all(gradient is None for gradient in arriving):
            continue
        if not any(name in active for name in reads_numbers(node)):
            continue
        rule = find(node)
        if rule is None:
            raise UnsupportedOperator(node.op_type, label(node), _why_no_rule(node))
        step = Step(node, network, ops, arriving, active, frozenset(wanted))
        rule(step)
        for name, gradient in step.given:
            pending.setdefault(name, []).append(gradient)
    for name in wanted:
        if name not in totals:
            totals[name] = _total(ops, pending, name) or _zero(network, ops, name)
    return totals


def _quantised(node: onnx.NodeProto) -> bool:
    kind = node.op_type
    return "Quantize" in kind or "Integer" in kind or kind.startswith("QLinear")


def _why_no_rule(node: onnx.NodeProto) -> str:
    if _quantised(node):
        return "the network is quantised, and rounding has no derivative; use the float network it was made of"
    where = f" in domain {node.domain}" if node.domain else ""
    return f"there is no rule for it{where}"


def _zero(network: Network, ops: Ops, name: str) -> Value:
    value = network.value(name)
    return ops.constant(np.zeros([1] * value.rank), value.dtype)


def _active(network: Network, seeds: Mapping[str, Value], wanted: Sequence[str]) -> frozenset[str]:
    """Floating-point tensors on a path from a wanted tensor to a seeded one.

    A path through integers ends there: they have no derivative. Quantisation is the exception: what it rounds
    is meant to be followed, and a gradient of zero would be a lie, so it is refused.
    """
    before = network.ancestors(seeds)
    reached = set(wanted)
    for node in network.nodes:
        if not any(name in reached for name in reads_numbers(node)):
            continue
        if _quantised(node) and before.intersection(node.output):
            raise UnsupportedOperator(node.op_type, label(node), _why_no_rule(node))
        reached.update(
            name
            for name in node.output
            if name and (name not in network.values or network.values[name].dtype in FLOATS)
        )
    return frozenset(reached & before)


def _total(ops: Ops, pending: dict[str, list[Value]], name: str) -> Value | None:
    """Everything that arrived at a tensor, summed. Narrow (under-broadcast) parts meet before wide ones."""
    parts = sorted(pending.pop(name, []), key=lambda part: sum(dim.size for dim in part.shape))
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = ops.add(total, part)
    return total
