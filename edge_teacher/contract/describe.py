"""The parts of docs/protocol.md that follow from the code: python -m edge_teacher.contract.describe

Without an argument it prints them; with the document's path it writes them into it. A test compares.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from edge_teacher.contract import frame, limits, messages
from edge_teacher.contract.errors import RpcError

_WORDS = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    bytes: "binary",
    type(None): "nil",
}

_MEANINGS = {
    400: ("malformed: the request, or its version, cannot be understood", "no"),
    403: ("this coordinator may not, or an older student than the active one", "no"),
    404: ("no such method, tap, image block, task or student", "after sending what is missing"),
    408: (
        "it expired before it was computed, or waited in vain for memory",
        "with a later deadline",
    ),
    413: ("too large; the limit is in the sentence", "in smaller parts"),
    429: ("busy; `retry_after_s` says when to come again", "by itself, within the deadline"),
    500: ("the runtime failed, or a student did not prove itself", "no"),
    503: ("shutting down", "elsewhere"),
}


def sections() -> dict[str, str]:
    """Name -> Markdown."""
    return {"messages": _messages(), "limits": _limits(), "errors": _errors()}


def fill(document: str) -> str:
    """`document` with what stands between `<!-- NAME -->` and `<!-- end of NAME -->` written anew."""
    for name, content in sections().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        document, count = pattern.subn(lambda m, c=content: m[1] + c + m[2], document)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the document has {count} places for {name!r}, and must have one")
    return document


def _structs() -> list[type[msgspec.Struct]]:
    """In the order of the source."""
    found = [
        value
        for value in vars(messages).values()
        if isinstance(value, type)
        and issubclass(value, messages.Wire)
        and value is not messages.Wire
    ]
    return [frame.TensorSpec, *found, limits.Limits]


def _messages() -> str:
    parts = []
    for kind in _structs():
        said = inspect.cleandoc(kind.__doc__ or "")
        parts.append(f"#### {kind.__name__}\n\n{said}\n")
        fields = msgspec.structs.fields(kind)
        if fields:
            notes, hints = _field_docs(kind), get_type_hints(kind)
            rows = [
                (f"`{f.encode_name}`", _type(hints[f.name]), _default(f), notes.get(f.name, ""))
                for f in fields
            ]
            parts.append(_table(("field", "type", "default", ""), rows))
    return "\n".join(parts) + "\n"


def _limits() -> str:
    source = ast.parse(inspect.getsource(limits)).body
    notes = _docs_in(source)
    rows = [
        (f"`{name}`", f"{getattr(limits, name):,}", note)
        for name, note in notes.items()
        if name.isupper()
    ]
    return _table(("limit", "bytes", ""), rows) + "\n"


def _errors() -> str:
    kinds = sorted((k for k in RpcError.__subclasses__() if k.code), key=lambda k: k.code)
    rows = [(str(k.code), k.__name__, *_MEANINGS[k.code]) for k in kinds]
    return _table(("status", "name here", "meaning", "ask again?"), rows) + "\n"


def _field_docs(kind: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return _docs_in(definition.body)


def _docs_in(body: Iterable[ast.stmt]) -> dict[str, str]:
    """Name -> the string that stands below its assignment."""
    found: dict[str, str] = {}
    name = ""
    for statement in body:
        target: ast.expr | None = None
        if isinstance(statement, ast.AnnAssign):
            target = statement.target
        elif isinstance(statement, ast.Assign):
            target = statement.targets[0]
        if isinstance(target, ast.Name):
            name = target.id
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and name:
            found[name] = " ".join(str(statement.value.value).split())
            name = ""
        else:
            name = ""
    return found


def _type(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"array of {_type(arguments[0])}"
    if origin is tuple:
        return "array [" + ", ".join(_type(argument) for argument in arguments) + "]"
    if origin is dict:
        return f"map of string to {_type(arguments[1])}"
    return str(hint.__name__)


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    plain = {(): "[]", "": '""', None: "nil", True: "true", False: "false"}
    if value == {}:
        return "{}"
    if isinstance(value, tuple) and value:
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    if isinstance(value, str) and value:
        return f'"{value}"'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return plain[value]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """With columns that stand below each other, for who reads the source; the last is as long as it is."""
    body = [head, *rows]
    widths = [max(3, *map(len, column)) for column in zip(*body, strict=True)][:-1]
    lines = [body[0], tuple("-" * width for width in (*widths, 3)), *body[1:]]
    padded = ([*map(str.ljust, cells, widths), cells[-1]] for cells in lines)
    return "\n".join("| " + " | ".join(cells).rstrip() + " |" for cells in padded) + "\n"


def main(arguments: list[str]) -> int:
    if arguments:
        path = Path(arguments[0])
        path.write_text(fill(path.read_text()))
    else:
        found: Mapping[str, str] = sections()
        sys.stdout.write("\n".join(found.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
