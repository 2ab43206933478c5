from __future__ import annotations

import pytest

from edge_teacher.contract import PROTOCOL
from edge_teacher.contract.errors import Malformed
from edge_teacher.contract.versions import minor_of


@pytest.mark.parametrize(("version", "minor"), [("", 0), ("1.0", 0), ("1.1", 1), ("1.9999", 9999)])
def test_any_minor_of_this_major(version: str, minor: int) -> None:
    assert minor_of(version, "ada") == minor


def test_our_own() -> None:
    assert minor_of(PROTOCOL, "ada") == int(PROTOCOL.split(".")[1])


@pytest.mark.parametrize("version", ["0.9", "2.0", "10.1"])
def test_another_major_is_refused_with_what_to_do(version: str) -> None:
    with pytest.raises(Malformed, match=rf"ada speaks protocol {version}.*update the older one"):
        minor_of(version, "ada")


@pytest.mark.parametrize(
    "version", ["1", "1.", ".1", "1.1.1", "one", "1.1\n", "-1.0", "1.99999", "١.0"]
)
def test_what_is_no_version_is_malformed(version: str) -> None:
    with pytest.raises(Malformed):
        minor_of(version, "ada")
