"""Frees a batch size that an exporter wrote into the graph.

A file traced with one image holds its batch in constants: Reshape to [1, 9216], the sizes of a Resize, a class
token [1, 1, C] that Concat joins. Where the batch lies is followed from the input on, axis by axis; a constant
that holds it is rewritten to whatever the running graph has. The result is proved, not trusted: at batch 2
every image must get what the file gave it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NoReturn

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.graph.errors import UnsupportedNetwork
from export.graph.network import (
    Observation,
    lift_constants,
    observe,
    pixel_dependent,
    random_images,
    session,
)
from export.graph.registry import label

_END = 2**63 - 1
_AGREEMENT = (
    1e-3  # of the largest number: float32 sums are ordered differently at other batch sizes
)
_DROPS_AXES = ("Reduce", "ArgM")
Node = onnx.NodeProto


def free_batch(model: onnx.ModelProto, input_name: str, sizes: tuple[int, ...], batch: int) -> bool:
    """Rewrite `model`, which runs at this batch size, to run at any. True if anything had to be rewritten.

    `sizes` is the input's shape without the batch. Raises UnsupportedNetwork if the batch cannot be followed,
    or if the rewritten network would mix the images of a batch.
    """
    original = onnx.ModelProto()
    original.CopyFrom(model)
    lift_constants(model.graph)
    dependent = pixel_dependent(model.graph, input_name)
    (seen,) = observe(model, input_name, sizes, (batch,), dependent)
    squeezed = _name_squeezed_axes(model.graph, seen, batch)
    if squeezed:  # the batch stays, so every rank after it is one higher
        (seen,) = observe(model, input_name, sizes, (batch,), dependent)
    walk = _Walk(model.graph, {name: found.shape for name, found in seen.items()}, batch)
    walk.run(input_name, (batch, *sizes))
    if squeezed or walk.changed:
        _prove(original, model, input_name, sizes, batch, walk.at)
    return squeezed or walk.changed


def _name_squeezed_axes(graph: onnx.GraphProto, seen: dict[str, Observation], batch: int) -> bool:
    """Squeeze without axes drops a batch of one as well: name the axes it is meant to drop."""
    changed = False
    for node in graph.node:
        found = seen.get(node.input[0]) if node.op_type == "Squeeze" else None
        named = len(node.input) > 1 and node.input[1]
        if found is None or named or batch != 1 or found.shape[:1] != (1,):
            continue
        axes = [axis for axis, size in enumerate(found.shape) if size == 1 and axis > 0]
        name = f"batch/{node.output[0]}/axes"
        graph.initializer.append(numpy_helper.from_array(np.asarray(axes, np.int64), name))
        node.input[:] = [node.input[0], name]
        changed = True
    return changed


class _Walk:
    """One pass over the nodes. `at` is the axis of every tensor that holds the batch (slowest, if merged)."""

    def __init__(
        self, graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]], batch: int
    ) -> None:
        self.graph, self.batch = graph, batch
        self.changed = False
        self.at: dict[str, int] = {}
        self.shapes = {t.name: tuple(t.dims) for t in graph.initializer} | shapes
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes: list[Node] = []
        self.follow: dict[str, Callable[[Node, int], int]] = {
            "Reshape": self._reshape, "Flatten": self._flatten, "Squeeze": self._squeeze,
            "Unsqueeze": self._unsqueeze, "Transpose": self._transpose, "Expand": self._expand,
            "Slice": self._slice, "Gather": self._gather, "Resize": self._resize,
        }  # fmt: skip

    def run(self, input_name: str, shape: tuple[int, ...]) -> None:
        self.at[input_name], self.shapes[input_name] = 0, shape
        for node in self.graph.node:
            carriers = [i for i, name in enumerate(node.input) if name in self.at]
            known = all(name in self.shapes for name in node.output if name)
            if carriers and known and node.op_type not in {"Shape", "Size"}:
                if node.op_type in self.follow and carriers[0] == 0:
                    axis = self.follow[node.op_type](node, self.at[node.input[0]])
                else:
                    axis = self._other(node, carriers)
                self.at.update((name, axis) for name in node.output if name)
            self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    # -- operators that need to know ----------------------------------------------------------

    def _other(self, node: Node, carriers: list[int]) -> int:
        """Most operators leave the batch where it is, counted from the right where ranks differ."""
        ranks = [len(self.shapes[node.input[i]]) for i in carriers]
        widest = carriers[ranks.index(max(ranks))]
        axis = self.at[node.input[widest]]
        if node.op_type == "Concat":
            self._repeat_constants(node, axis)
        lost = max(ranks) - len(self.shapes[node.output[0]])
        if node.op_type.startswith(_DROPS_AXES) and lost > 0:
            axes = self._constant(node, 1)
            if node.op_type.startswith("ArgM"):
                axes = [next((a.i for a in node.attribute if a.name == "axis"), 0)]
            dropped = {axis % max(ranks) for axis in axes or ()}
            if axes is None or axis in dropped:
                self._refuse(node, "it reduces over the batch")
            return axis - sum(other < axis for other in dropped)
        return max(0, axis - lost)

    def _repeat_constants(self, node: Node, axis: int) -> None:
        """Concat of a batch and something that is the same for every image: repeat the latter N times."""
        joined = _attribute(node, "axis") % len(self.shapes[node.output[0]])
        carrier = next(name for name in node.input if name in self.at)
        for i, name in enumerate(node.input):
            alone = name not in self.at and self.shapes[name][axis] == 1 == self.batch
            if not alone or joined == axis:
                continue
            rank = len(self.shapes[name])
            target = self._new(node, f"target_{i}")
            self._sized(node, carrier, axis, [1] * rank, target)
            repeated = self._new(node, f"repeated_{i}")
            self.nodes.append(helper.make_node("Expand", [name, target], [repeated], name=repeated))
            node.input[i] = repeated

    def _reshape(self, node: Node, axis: int) -> int:
        shape, out = self.shapes[node.input[0]], self.shapes[node.output[0]]
        slower = prod(shape[:axis])
        place = next(
            (i for i, size in enumerate(out) if prod(out[:i]) == slower and size % self.batch == 0),
            None,
        )
        if place is None:
            self._refuse(node, f"its target {list(out)} mixes the batch with a faster axis")
        target = self._constant(node, 1)
        copied = target is not None and place == axis and target[place] == 0
        if target is None or target[place] == -1 or copied:
            return place
        free = [-1 if i == place else size for i, size in enumerate(out)]
        if free != [1] or len(shape) != 1:
            self._replace(node, 1, free)
        return place

    def _flatten(self, node: Node, axis: int) -> int:
        shape = self.shapes[node.input[0]]
        split = _attribute(node, "axis", 1) % (len(shape) + 1)
        slower = shape[:axis] if axis < split else shape[split:axis]
        if prod(slower) != 1:
            self._refuse(node, "it mixes the batch with a slower axis")
        return int(axis >= split)

    def _squeeze(self, node: Node, axis: int) -> int:
        shape = self.shapes[node.input[0]]
        axes = self._constant(node, 1)
        dropped = (
            {a % len(shape) for a in axes}
            if axes is not None
            else {a for a, size in enumerate(shape) if size == 1}
        )
        if axis in dropped:
            self._refuse(node, "it drops the batch axis")
        return axis - sum(other < axis for other in dropped)

    def _unsqueeze(self, node: Node, axis: int) -> int:
        rank = len(self.shapes[node.output[0]])
        added = {a % rank for a in self._constant(node, 1) or ()}
        return [a for a in range(rank) if a not in added][axis]

    def _transpose(self, node: Node, axis: int) -> int:
        rank = len(self.shapes[node.input[0]])
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return (perm or list(reversed(range(rank)))).index(axis)

    def _expand(self, node: Node, axis: int) -> int:
        shape, out = self.shapes[node.input[0]], self.shapes[node.output[0]]
        place = axis + len(out) - len(shape)
        target = self._constant(node, 1)
        if target is not None:
            from_right = place - len(out)
            if -from_right <= len(target) and target[from_right] not in (1, -1):
                target[from_right] = 1
                self._replace(node, 1, target)
        return place

    def _slice(self, node: Node, axis: int) -> int:
        rank = len(self.shapes[node.input[0]])
        starts, ends = self._constant(node, 1), self._constant(node, 2)
        if starts is None or ends is None:
            return axis
        axes = [a % rank for a in self._constant(node, 3) or range(len(starts))]
        if axis in axes:
            i = axes.index(axis)
            steps = self._constant(node, 4) or [1] * len(starts)
            if starts[i] != 0 or ends[i] < self.batch or steps[i] != 1:
                self._refuse(node, "it picks images of the batch")
            if ends[i] < 2**31 - 1:
                ends[i] = _END
                self._replace(node, 2, ends)
        return axis

    def _gather(self, node: Node, axis: int) -> int:
        rank = len(self.shapes[node.input[0]])
        along = _attribute(node, "axis") % rank
        if along == axis:
            self._refuse(node, "it picks images of the batch")
        grown = len(self.shapes[node.output[0]]) - rank
        return axis + grown if along < axis else axis

    def _resize(self, node: Node, axis: int) -> int:
        sizes = self._constant(node, 3)
        named = any(a.name == "axes" for a in node.attribute)
        if sizes and not named and axis == 0:
            target = self._new(node, "sizes")
            self._sized(node, node.input[0], 0, sizes, target)
            node.input[3] = target
        return axis

    # -- what they use ------------------------------------------------------------------------

    def _constant(self, node: Node, i: int) -> list[int] | None:
        """A stored integer input; None if it is absent or computed."""
        stored = self.stored.get(node.input[i]) if i < len(node.input) else None
        return None if stored is None else [int(n) for n in numpy_helper.to_array(stored).ravel()]

    def _store(self, node: Node, what: str, numbers: Sequence[int]) -> str:
        name = self._new(node, what)
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(numbers, np.int64), name))
        return name

    def _new(self, node: Node, what: str) -> str:
        self.changed = True
        return f"batch/{node.output[0]}/{what}"

    def _replace(self, node: Node, i: int, numbers: Sequence[int]) -> None:
        node.input[i] = self._store(node, f"input_{i}", numbers)

    def _sized(self, node: Node, like: str, axis: int, sizes: list[int], out: str) -> None:
        """Nodes that put `sizes` into `out`, with the running batch of `like` at `axis`."""
        running = f"{out}/batch"
        self.nodes.append(helper.make_node("Shape", [like], [running], start=axis, end=axis + 1))
        parts = [running]
        if axis:
            parts.insert(0, self._store(node, f"{out}/before", sizes[:axis]))
        if axis + 1 < len(sizes):
            parts.append(self._store(node, f"{out}/after", sizes[axis + 1 :]))
        self.nodes.append(helper.make_node("Concat", parts, [out], name=out, axis=0))

    def _refuse(self, node: Node, reason: str) -> NoReturn:
        raise UnsupportedNetwork(
            f"the file is made for a batch of {self.batch}, and that cannot be freed: node {label(node)!r} "
            f"({node.op_type}): {reason}; export it with a dynamic batch axis"
        )


def _attribute(node: Node, name: str, default: int = 0) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _prove(
    original: onnx.ModelProto,
    freed: onnx.ModelProto,
    input_name: str,
    sizes: tuple[int, ...],
    batch: int,
    at: Mapping[str, int],
) -> None:
    """Raises UnsupportedNetwork unless two images in one batch get what each got from the file alone."""
    images = random_images(original, input_name, (2, *sizes))
    alone = session(original)
    each = [
        alone.run(None, {input_name: np.repeat(images[i : i + 1], batch, axis=0)}) for i in (0, 1)
    ]
    try:
        together = session(freed).run(None, {input_name: images})
    except Exception as error:
        raise UnsupportedNetwork(
            f"the file is made for a batch of {batch}, and at batch 2 ONNX Runtime says: {error}; "
            "export it with a dynamic batch axis"
        ) from error
    for output, first, second, both in zip(original.graph.output, *each, together, strict=True):
        if not isinstance(both, np.ndarray) or both.dtype.kind != "f":
            continue
        axis = at.get(output.name)
        for i, single in enumerate((first, second)):
            got = both if axis is None else np.take(both, [i], axis)
            kept = (
                axis is not None and single.ndim == both.ndim
            )  # else its batch of one was squeezed
            expected = np.take(single, [0], axis) if kept else single
            size = float(np.abs(expected).max(initial=0))
            same = got.size == expected.size
            if (
                not same
                or np.abs(got.ravel() - expected.ravel()).max(initial=0) > _AGREEMENT * size
            ):
                raise UnsupportedNetwork(
                    f"the file is made for a batch of {batch}; with its batch freed, output {output.name!r} "
                    "mixes the images; export it with a dynamic batch axis"
                )
