from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_teacher.contract import PROTOCOL, describe, errors, messages, topics
from tests.edge_teacher.rpc.test_pair import ACL
from tests.examples import ROOT

DOCUMENT = Path(ROOT) / "docs" / "protocol.md"


def test_the_document_says_what_the_structs_say() -> None:
    assert describe.fill(DOCUMENT.read_text()) == DOCUMENT.read_text(), (
        "run python -m edge_teacher.contract.describe docs/protocol.md"
    )


def test_it_is_about_this_version() -> None:
    assert DOCUMENT.read_text().startswith(f"# The protocol, version {PROTOCOL}\n")


def test_every_message_field_and_error_is_in_it() -> None:
    text = {name: re.sub(" +", " ", said) for name, said in describe.sections().items()}
    assert "#### FeaturesQuery" in text["messages"]
    assert "| `mirrored` | boolean | false |" in text["messages"]
    assert '`"maps"` or `"pooled"` or `"attention"`' in text["messages"]
    assert "| `block` | string | required |" in text["messages"]
    kinds = [
        k for k in vars(messages).values() if isinstance(k, type) and issubclass(k, messages.Wire)
    ]
    assert text["messages"].count("#### ") == len(kinds) - 1 + 2  # no base; TensorSpec and Limits
    for kind in errors.RpcError.__subclasses__():
        assert not kind.code or f"| {kind.code} | {kind.__name__} |" in text["errors"]


def test_the_columns_of_a_table_stand_below_each_other() -> None:
    table = describe.sections()["errors"].strip().splitlines()
    for column in range(1, 4):
        assert len({[i for i, c in enumerate(line) if c == "|"][column] for line in table}) == 1


def test_every_topic_in_it_is_one_of_ours() -> None:
    rows = re.findall(r"^\| `(fedsa/v1/\S+)` +\|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) == 8
    for row in rows:
        name = row.replace("<device>", "d1").replace("<coordinator>", "ada")
        assert topics.parse(name.replace("<method>", "features")) is not None, row


def test_the_access_rules_in_it_are_the_tested_ones() -> None:
    assert ACL.replace("ada", "coordinator") in DOCUMENT.read_text()


def test_a_document_without_a_place_for_them_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 places for 'messages'"):
        describe.fill("nothing")


def test_writing_changes_only_what_is_between_the_marks(tmp_path: Path) -> None:
    path = tmp_path / "p.md"
    marks = "".join(f"<!-- {n} -->\nold\n<!-- end of {n} -->\nkept\n" for n in describe.sections())
    path.write_text(marks)
    assert describe.main([str(path)]) == 0
    assert path.read_text().count("kept") == 3
    assert "old\n" not in path.read_text()
