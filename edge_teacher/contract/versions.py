"""Which peers understand each other: one major version, any minor.

A newer minor adds fields with defaults, user properties and message kinds that the older peer ignores;
whatever else it adds it uses only towards a peer that has shown at least that minor.
"""

from __future__ import annotations

import re

from edge_teacher.contract import PROTOCOL
from edge_teacher.contract.errors import Malformed

_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")
_MAJOR = int(PROTOCOL.split(".")[0])

BULK_SINCE = 1
"""The minor with `put` and `data` topics and the control message `done`."""


def minor_of(version: str, who: str) -> int:
    """The minor of `version`, the user property `v`; without one a peer speaks 1.0.

    Raises Malformed for another major version, or for what is no version.
    """
    found = _VERSION.fullmatch(version or f"{_MAJOR}.0")
    if found is None:
        raise Malformed(
            f"{who} gives the protocol version {version[:32]!r}, which is not MAJOR.MINOR"
        )
    if int(found[1]) != _MAJOR:
        raise Malformed(
            f"{who} speaks protocol {version} and this side {PROTOCOL}: peers of different major "
            "versions do not understand each other; update the older one"
        )
    return int(found[2])
