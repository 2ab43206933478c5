from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_teacher.contract import frame
from edge_teacher.contract.errors import Malformed
from edge_teacher.contract.messages import Answered, Empty, FeaturesQuery, Problem

DTYPES = ["u1", "<i8", "<f2", "<f4"]
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=6, min_side=0, max_side=4)
    )
)


def by_hand(header: object, tail: bytes = b"") -> bytes:
    """A frame written from the specification, not with the code under test."""
    packed = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    return b"FSA1" + struct.pack("<I", len(packed)) + packed + tail


def described(name: str = "a", dtype: str = "u8", shape: Any = (1,)) -> dict[str, Any]:
    return {"body": {}, "tensors": [{"name": name, "dtype": dtype, "shape": shape}]}


@given(st.dictionaries(st.text(max_size=8), arrays, max_size=4))
def test_every_tensor_survives_the_wire(tensors: dict[str, np.ndarray]) -> None:
    message = Answered(compute_ms=1.5, classes=("a", "ü"))
    found, decoded = frame.decode(frame.encode(message, tensors), Answered)
    assert found == message
    assert decoded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert decoded[name].dtype == array.dtype
        assert decoded[name].shape == array.shape
        assert decoded[name].tobytes() == array.tobytes()


def test_the_layout_is_the_documented_one() -> None:
    first, second = np.arange(3, dtype=np.uint8), np.array([1.0], np.float32)
    payload = frame.encode(Empty(), {"a": first, "b": second})
    assert payload[:4] == b"FSA1"
    (length,) = struct.unpack_from("<I", payload, 4)
    header = msgspec.msgpack.decode(payload[8 : 8 + length])
    assert header == {
        "body": {},
        "tensors": [
            {"name": "a", "dtype": "u8", "shape": [3]},
            {"name": "b", "dtype": "f32", "shape": [1]},
        ],
    }
    start = -(-(8 + length) // 64) * 64
    assert payload[start : start + 3] == b"\0\1\2"
    assert payload[start + 64 :] == struct.pack("<f", 1.0)
    assert set(payload[8 + length : start] + payload[start + 3 : start + 64]) == {0}


def test_decoding_copies_nothing() -> None:
    payload = frame.encode(Empty(), {"a": np.arange(1000, dtype=np.float32)})
    _, tensors = frame.decode(payload, Empty)
    assert not tensors["a"].flags.owndata
    assert np.shares_memory(tensors["a"], np.frombuffer(payload, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"][0] = 1


def test_a_transposed_view_is_sent_in_its_own_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    _, tensors = frame.decode(frame.encode(Empty(), {"a": array}), Empty)
    assert tensors["a"].tolist() == array.tolist()


@pytest.mark.parametrize("dtype", ["f8", "i4", ">f4", "?", "O"])
def test_a_dtype_the_wire_does_not_have_is_the_programmers_error(dtype: str) -> None:
    with pytest.raises(TypeError, match="dtype"):
        frame.encode(Empty(), {"a": np.zeros(2, dtype)})


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"FSA",
        b"FSA2\0\0\0\0",
        b"FSA1\xff\xff\xff\xff",
        b"FSA1\x01\0\0\0",
        by_hand(b""),
        by_hand([]),
        by_hand({"tensors": []}),
        by_hand({"body": []}),
        by_hand({"body": {}, "tensors": 3}),
        by_hand({"body": {}}, b"x"),
        by_hand(described(dtype="f64")),
        by_hand(described(shape=[-1])),
        by_hand(described(shape=[1] * 7), bytes(200)),
        by_hand(described(shape=[2**62, 2**62])),
        by_hand(described(shape=[1.0]), bytes(200)),
        by_hand(described(), bytes(500)),
        by_hand({**described(), "tensors": described()["tensors"] * 2}, bytes(200)),
    ],
)
def test_what_is_no_frame_is_refused(payload: bytes) -> None:
    with pytest.raises(Malformed):
        frame.decode(payload, Empty)


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 2**64 - 1], [2**63, 0]])
def test_an_empty_tensor_cannot_smuggle_in_a_size_no_array_can_have(shape: list[int]) -> None:
    header = msgspec.msgpack.encode(described(shape=shape))
    padding = bytes(-(8 + len(header)) % 64)
    with pytest.raises(Malformed):
        frame.decode(by_hand(header, padding), Empty)


@pytest.mark.parametrize(
    "header",
    [
        b"\x82\xa4body" + b"\x91" * 100_000 + b"\xc0\xa7tensors\x90",
        b"\x82\xa4body\x81\xa1x" + b"\x91" * 100_000 + b"\xc0\xa7tensors\x90",
    ],
    ids=["body", "unknown field of the body"],
)
def test_nesting_without_end_is_malformed_and_no_recursion_error(header: bytes) -> None:
    with pytest.raises(Malformed):
        frame.decode(by_hand(header), Empty)


def test_text_that_is_not_utf8_is_malformed() -> None:
    header = b"\x82\xa4body\x80\xa7tensors\x91\x83\xa4name\xa1\xff\xa5dtype\xa2u8\xa5shape\x90"
    with pytest.raises(Malformed):
        frame.decode(by_hand(header), Empty)


def test_every_truncation_is_noticed() -> None:
    payload = frame.encode(Answered(compute_ms=1), {"a": np.arange(9, dtype=np.float16)})
    for end in range(len(payload)):
        with pytest.raises(Malformed):
            frame.decode(payload[:end], Answered)


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_frame_is_malformed_or_still_a_frame(data: st.DataObject) -> None:
    query = FeaturesQuery(block="ab" * 32, form="attention")
    payload = bytearray(frame.encode(query, {"attention": np.ones((2, 3, 3), np.float32)}))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        message, tensors = frame.decode(bytes(payload), FeaturesQuery)
    except Malformed:
        return
    assert isinstance(message, FeaturesQuery)
    assert all(isinstance(array, np.ndarray) for array in tensors.values())


@given(st.binary(max_size=200))
def test_bytes_from_nowhere_never_do_worse_than_malformed(tail: bytes) -> None:
    for payload in (tail, by_hand(tail)):
        with pytest.raises(Malformed):
            frame.decode(payload, Problem)


def test_a_field_of_a_newer_minor_version_is_ignored() -> None:
    found, _ = frame.decode(by_hand({"body": {"code": 404, "message": "m", "later": 1}}), Problem)
    assert found == Problem(code=404, message="m")


class TestTensor:
    have = {"a": np.zeros((2, 3), np.uint8)}  # noqa: RUF012

    def test_the_wanted_one(self) -> None:
        assert frame.tensor(self.have, "a", "u8", 2, None) is self.have["a"]

    @pytest.mark.parametrize(
        ("name", "dtype", "shape"),
        [("b", "u8", (2, 3)), ("a", "f32", (2, 3)), ("a", "u8", (2, 4)), ("a", "u8", (None,))],
    )
    def test_any_other_is_malformed_by_name(
        self, name: str, dtype: str, shape: tuple[int | None, ...]
    ) -> None:
        with pytest.raises(Malformed, match=f"'{name}'"):
            frame.tensor(self.have, name, dtype, *shape)

    @pytest.mark.parametrize("dtype", ["f2", "f4"])
    def test_floats_come_as_float32(self, dtype: str) -> None:
        found = frame.floats({"a": np.array([0.5], dtype)}, "a")
        assert (found.dtype, found.tolist()) == (np.float32, [0.5])

    def test_floats_refuses_integers(self) -> None:
        with pytest.raises(Malformed, match="'a'"):
            frame.floats(self.have, "a")
