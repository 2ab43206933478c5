"""The part of an ONNX file that some of its outputs need, without the onnx package.

ONNX Runtime computes every node of a graph whatever is fetched (`only_execute_path_to_fetches` changed no
time in 1.31), and TensorRT builds what the outputs need: so features alone are asked of a graph that ends
there. A file is a protobuf message (field numbers: onnx.proto3 of ONNX 1.18); what is kept is kept byte for
byte, and what is not known is kept too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from edge_teacher.contract.errors import CheckFailed

_VARINT, _I64, _BYTES, _I32 = 0, 1, 2, 5  # wire types of protobuf
_MODEL_GRAPH = 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13  # of a graph
_NODE_INPUT, _NODE_OUTPUT, _NODE_ATTRIBUTE = 1, 2, 5
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_TENSOR_NAME, _VALUE_NAME = 8, 1
_NOTHING = ""  # the name of an optional input or output that is left out


class _Field(NamedTuple):
    number: int
    whole: memoryview
    """With its tag, as it stands in the message."""
    content: memoryview
    """Of a string, bytes or message; empty for a number."""


def digest(graph: bytes) -> str:
    """SHA-256 of an ONNX file, hexadecimal."""
    return hashlib.sha256(graph).hexdigest()


def outputs_of(graph: bytes, name: str = "the graph") -> tuple[str, ...]:
    """The outputs an ONNX file declares. Raises CheckFailed if it cannot be read."""
    try:
        parts = _graph(graph, name)
        return tuple(_text(p.content, _VALUE_NAME) for p in parts if p.number == _OUTPUT)
    except (ValueError, IndexError) as error:
        raise CheckFailed(_damaged(name)) from error


def cut(graph: bytes, outputs: Sequence[str], name: str = "the graph") -> bytes:
    """An ONNX file that computes `outputs` and nothing else; `graph` itself if those are all it has.

    Raises CheckFailed if the file cannot be read, has no such output, or has its nodes in no order.
    """
    try:
        return _cut(graph, outputs, name)
    except (ValueError, IndexError) as error:  # further in than `_graph` looks
        raise CheckFailed(_damaged(name)) from error


def _cut(graph: bytes, outputs: Sequence[str], name: str) -> bytes:
    """Raises ValueError or IndexError for a part that is no protobuf message, or a name that is no UTF-8."""
    parts = _graph(graph, name)
    declared = [_text(p.content, _VALUE_NAME) for p in parts if p.number == _OUTPUT]
    missing = set(outputs) - set(declared)
    if missing or not outputs:
        raise CheckFailed(
            f"{name} has no output {', '.join(sorted(missing)) or 'of no name'}; "
            f"it has {', '.join(declared)}"
        )
    if set(outputs) == set(declared):
        return graph
    tensors, nodes = _path(parts, set(outputs))
    if not tensors:
        raise CheckFailed(
            f"the nodes of {name} do not stand behind those they read, so no part of it can be told"
        )
    # An initialiser may be the default of an input (ONNX before IR 4), and an input stays.
    tensors.update(_text(p.content, _VALUE_NAME) for p in parts if p.number == _INPUT)
    kept = [
        part
        for i, part in enumerate(parts)
        if (i in nodes if part.number == _NODE else _stays(part, tensors, set(outputs)))
    ]
    body = b"".join(part.whole for part in kept)
    model = [
        _tagged(_MODEL_GRAPH, body) if field.number == _MODEL_GRAPH else bytes(field.whole)
        for field in _fields(memoryview(graph))
    ]
    return b"".join(model)


def _path(parts: list[_Field], outputs: set[str]) -> tuple[set[str], set[int]]:
    """(tensors, positions of nodes) that the outputs need.

    Nodes stand in topological order (ONNX IR, "Graphs"); where they do not, there are no tensors.
    """
    needed, nodes, passed = set(outputs), set(), set()
    for i in range(len(parts) - 1, -1, -1):
        if parts[i].number != _NODE:
            continue
        fields = list(_fields(parts[i].content))
        made = {str(f.content, "utf-8") for f in fields if f.number == _NODE_OUTPUT} - {_NOTHING}
        if needed.isdisjoint(made):
            passed.update(made)
            continue
        nodes.add(i)
        needed.update(_read(fields))
    return (needed if needed.isdisjoint(passed) else set()), nodes


def _read(node: Iterable[_Field]) -> Iterator[str]:
    """Tensors a node reads, those of the graphs inside it (If, Loop) too."""
    for field in node:
        if field.number == _NODE_INPUT:
            yield str(field.content, "utf-8")
        elif field.number == _NODE_ATTRIBUTE:
            for inner in _fields(field.content):
                if inner.number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                    for part in _fields(inner.content):
                        if part.number == _NODE:
                            yield from _read(_fields(part.content))
                        elif part.number == _OUTPUT:
                            yield _text(part.content, _VALUE_NAME)


def _stays(part: _Field, tensors: set[str], outputs: set[str]) -> bool:
    """Whether a part of the graph that is no node is needed."""
    if part.number == _INITIALIZER:
        return _text(part.content, _TENSOR_NAME) in tensors
    if part.number == _OUTPUT:
        return _text(part.content, _VALUE_NAME) in outputs
    return part.number != _VALUE_INFO or _text(part.content, _VALUE_NAME) in tensors


def _graph(model: bytes, name: str) -> list[_Field]:
    try:
        (graph,) = [f.content for f in _fields(memoryview(model)) if f.number == _MODEL_GRAPH]
        return list(_fields(graph))
    except (ValueError, IndexError) as error:
        raise CheckFailed(_damaged(name)) from error


def _damaged(name: str) -> str:
    return f"{name} is no ONNX file, or a damaged one: export it again"


def _fields(message: memoryview) -> Iterator[_Field]:
    """Raises ValueError or IndexError for what is no protobuf message."""
    start = 0
    while start < len(message):
        tag, at = _varint(message, start)
        kind, content = tag & 7, message[:0]
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _BYTES:
            size, at = _varint(message, at)
            content = message[at : at + size]
            at += size
        elif kind in (_I64, _I32):
            at += 8 if kind == _I64 else 4
        else:
            raise ValueError(f"no wire type {kind}")
        if at > len(message):
            raise ValueError("a field ends beyond its message")
        yield _Field(tag >> 3, message[start:at], content)
        start = at


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _text(message: memoryview, number: int) -> str:
    """The string in that field, empty if there is none."""
    found = [field.content for field in _fields(message) if field.number == number]
    return str(found[-1], "utf-8") if found else ""


def _tagged(number: int, content: bytes) -> bytes:
    head, size = bytearray([number << 3 | _BYTES]), len(content)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + content
