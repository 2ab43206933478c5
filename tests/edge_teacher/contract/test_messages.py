"""What an older or a newer peer makes of our messages: the wire's names are a promise."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_teacher.contract import messages
from edge_teacher.contract.limits import Limits
from edge_teacher.contract.messages import (
    Card,
    Control,
    FeaturesQuery,
    PutImages,
    RuntimeInfo,
    State,
    StudentOffer,
    TapInfo,
    TeacherInfo,
    Wire,
)

CARD = Card(
    device="d",
    bundle="ab" * 32,
    teacher=TeacherInfo(
        name="t",
        version=1,
        input_size=(32, 32),
        taps={"last": TapInfo(channels=3, height=4, width=4)},
        saliency_tap="last",
        saliency_size=(4, 4),
        saliency_kind="grad-cam",
    ),
    runtime=RuntimeInfo(name="onnxruntime", version="1", provider="CPU", threads=1),
    limits=Limits(),
)

MESSAGES: list[tuple[msgspec.Struct, dict[str, Any]]] = [
    (
        State(online=True, session="s", software="x", protocol="1.0", since_unix_s=1.5),
        {"online": True, "session": "s", "software": "x", "protocol": "1.0", "since_unix_s": 1.5},
    ),
    (PutImages(block="b", shape=(1, 2, 3, 3)), {"block": "b", "shape": [1, 2, 3, 3]}),
    (FeaturesQuery(block="b"), {"block": "b"}),
    (FeaturesQuery(block="b", form="pooled"), {"block": "b", "form": "pooled"}),
    (
        StudentOffer(task="t", version=2, digest="d", total_bytes=9, offset=3),
        {"task": "t", "version": 2, "digest": "d", "total_bytes": 9, "offset": 3},
    ),
    (
        Control(kind="resend", correlation=b"c", respond_to="r", ranges=((0, 5),)),
        {"kind": "resend", "correlation": b"c", "respond_to": "r", "ranges": [[0, 5]]},
    ),
]


@pytest.mark.parametrize(("message", "wire"), MESSAGES)
def test_the_names_and_values_on_the_wire(message: msgspec.Struct, wire: dict[str, Any]) -> None:
    packed = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(packed) == wire
    assert msgspec.msgpack.decode(packed, type=type(message)) == message


@pytest.mark.parametrize(("message", "wire"), MESSAGES)
def test_a_newer_peers_fields_are_ignored(message: msgspec.Struct, wire: dict[str, Any]) -> None:
    packed = msgspec.msgpack.encode({**wire, "from_the_future": [1, 2]})
    assert msgspec.msgpack.decode(packed, type=type(message)) == message


def test_a_card_survives_and_needs_nothing_beyond_what_1_0_had() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(CARD), type=Card) == CARD
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(CARD))
    assert set(wire) == {"device", "bundle", "teacher", "runtime", "limits"}
    # Limits are always spelt out: a peer's defaults may be others.
    assert set(wire["limits"]) == set(Limits.__struct_fields__)


@pytest.mark.parametrize(
    "wrong",
    [
        {"block": "b", "form": "everything"},
        {"block": "b", "dtype": "f64"},
        {"block": 3},
        {"form": "maps"},
    ],
)
def test_a_value_outside_the_contract_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(wrong), type=FeaturesQuery)


def test_every_message_is_frozen() -> None:
    kinds = [k for k in vars(messages).values() if isinstance(k, type) and issubclass(k, Wire)]
    assert len(kinds) > 15
    assert all(kind.__struct_config__.frozen for kind in kinds)
