"""A shared library of nothing but names, so that bindings can be imported where what they bind is not.

Written as bytes (System V ABI, AMD64): one segment with the code `return 0`, a hash table with one bucket,
symbols and their names. No compiler is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_HEADER, _SEGMENT, _SYMBOL, _DYNAMIC = 64, 56, 24, 16
_HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 4, 5, 6, 10, 11, 14


def stub_library(soname: str, functions: Sequence[str]) -> bytes:
    """An x86-64 library with these functions, each of which returns 0."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (soname, *functions))
    at = {name: names.index(b"\0" + name.encode() + b"\0") + 1 for name in (soname, *functions)}
    code = b"\x31\xc0\xc3".ljust(8, b"\0")
    code_at = _HEADER + 2 * _SEGMENT
    table_at = code_at + len(code)
    # One bucket: its chain goes through all symbols.
    count = len(functions) + 1
    chain = [0, *range(2, count), 0]
    table = struct.pack(f"<{3 + count}I", 1, count, 1, *chain).ljust(
        (3 + count + 1) // 2 * 8, b"\0"
    )
    symbols_at = table_at + len(table)
    symbols = bytes(_SYMBOL) + b"".join(
        struct.pack("<IBBHQQ", at[name], 0x12, 0, 1, code_at, 3) for name in functions
    )
    names_at = symbols_at + len(symbols)
    names = names.ljust((len(names) + 7) // 8 * 8, b"\0")
    dynamic_at = names_at + len(names)
    dynamic = b"".join(
        struct.pack("<QQ", tag, value)
        for tag, value in (
            (_SONAME, at[soname]),
            (_HASH, table_at),
            (_STRTAB, names_at),
            (_SYMTAB, symbols_at),
            (_STRSZ, len(names)),
            (_SYMENT, _SYMBOL),
            (0, 0),
        )
    )
    end = dynamic_at + len(dynamic)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, _HEADER, 0, 0, _HEADER, _SEGMENT, 2, 0, 0, 0
    )
    load = struct.pack("<IIQQQQQQ", 1, 7, 0, 0, 0, end, end, 4096)
    of_dynamic = struct.pack(
        "<IIQQQQQQ", 2, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8
    )
    return b"".join([header, load, of_dynamic, code, table, symbols, names, dynamic])
