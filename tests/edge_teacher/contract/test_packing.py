from __future__ import annotations

import struct

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_teacher.contract import frame, packing
from edge_teacher.contract.errors import Malformed
from edge_teacher.contract.messages import Empty

MANY = 1 << 20


def sparse(count: int) -> np.ndarray:
    """Like features behind a ReLU: half of them zero."""
    values = np.random.default_rng(0).standard_normal(count).astype(np.float16)
    return np.maximum(values, 0)


def packed_frame(data: bytes, shape: list[int], dtype: str = "u8") -> bytes:
    """By the specification, not with the code under test."""
    spec = {"name": "a", "dtype": dtype, "shape": shape, "packed": len(data)}
    header = msgspec.msgpack.encode({"body": {}, "tensors": [spec]})
    head = b"FSA1" + struct.pack("<I", len(header)) + header
    return head + bytes(-len(head) % 64) + data


def test_what_packs_is_smaller_and_comes_back() -> None:
    values = sparse(100_000)
    plain = frame.encode_parts(Empty(), {"a": values})
    packed = frame.encode_parts(Empty(), {"a": values}, packed=True)
    assert packed.nbytes < 0.7 * plain.nbytes
    _, tensors = frame.decode(packed.join(), Empty, most_unpacked_bytes=MANY)
    assert np.array_equal(tensors["a"], values)
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"][0] = 1


def test_what_does_not_pack_travels_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    small = np.zeros(100, np.uint8)
    packed = frame.encode(Empty(), {"a": noise, "b": small})
    assert frame.encode_parts(Empty(), {"a": noise, "b": small}, packed=True).join() == packed
    assert b"packed" not in packed  # so that a peer of 1.0 reads it


def test_it_is_not_accepted_unless_it_was_asked_for() -> None:
    payload = frame.encode_parts(Empty(), {"a": sparse(50_000)}, packed=True).join()
    with pytest.raises(Malformed, match="more than allowed"):
        frame.decode(payload, Empty)


def test_all_of_a_frame_counts_against_what_is_allowed() -> None:
    tensors = {name: sparse(50_000) for name in "abc"}
    payload = frame.encode_parts(Empty(), tensors, packed=True).join()
    frame.decode(payload, Empty, most_unpacked_bytes=300_000)
    with pytest.raises(Malformed, match="'c' unpacks to 100000 bytes"):
        frame.decode(payload, Empty, most_unpacked_bytes=299_999)


class TestHostile:
    def refuse(self, payload: bytes) -> None:
        with pytest.raises(Malformed):
            frame.decode(payload, Empty, most_unpacked_bytes=MANY)

    def test_a_bomb_is_measured_before_it_goes_off(self) -> None:
        bomb = zstandard.compress(bytes(64 << 20))
        assert len(bomb) < 10_000
        self.refuse(packed_frame(bomb, [64 << 20]))  # honest, and too large
        self.refuse(packed_frame(bomb, [1000]))  # the shape lies

    def test_a_frame_that_does_not_state_its_size(self) -> None:
        data = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(5000))
        self.refuse(packed_frame(data, [5000]))

    def test_a_frame_that_states_another_size_than_it_holds(self) -> None:
        data = bytearray(zstandard.compress(bytes(range(256)) * 2))
        position = data.index(
            struct.pack("<H", 512 - 256)
        )  # RFC 8878, 3.1.1.1.4: two bytes, less 256
        data[position : position + 2] = struct.pack("<H", 9999 - 256)
        self.refuse(packed_frame(bytes(data), [9999]))

    def test_bytes_behind_the_frame(self) -> None:
        data = zstandard.compress(bytes(5000))
        self.refuse(packed_frame(data + b"x", [5000]))
        self.refuse(packed_frame(data + data, [5000]))

    def test_no_frame_at_all(self) -> None:
        self.refuse(packed_frame(b"garbage", [5000]))
        self.refuse(packed_frame(b"", [5000]))

    @pytest.mark.parametrize("packed", [-1, 1 << 63, 1 << 40])
    def test_a_length_no_frame_has(self, packed: int) -> None:
        spec = {"name": "a", "dtype": "u8", "shape": [5], "packed": packed}
        header = msgspec.msgpack.encode({"body": {}, "tensors": [spec]})
        self.refuse(b"FSA1" + struct.pack("<I", len(header)) + header + bytes(100))

    @settings(max_examples=200)
    @given(st.data())
    def test_damage_is_malformed_or_still_the_size_it_said(self, data: st.DataObject) -> None:
        payload = bytearray(packed_frame(zstandard.compress(bytes(5000), 1), [5000]))
        for _ in range(data.draw(st.integers(1, 4))):
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
        try:
            _, tensors = frame.decode(bytes(payload), Empty, most_unpacked_bytes=MANY)
        except Malformed:
            return
        assert sum(array.nbytes for array in tensors.values()) <= MANY


def test_without_the_library_nothing_is_offered_and_a_packed_tensor_is_malformed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    payload = frame.encode_parts(Empty(), {"a": sparse(50_000)}, packed=True).join()
    monkeypatch.setattr(packing, "zstandard", None)
    assert not packing.available()
    with pytest.raises(Malformed, match="has not offered"):
        frame.decode(payload, Empty, most_unpacked_bytes=MANY)


def test_a_frame_cut_in_ranges_is_the_frame() -> None:
    tensors = {"a": np.arange(1000, dtype=np.float32), "b": np.arange(7, dtype=np.uint8)}
    encoded = frame.encode_parts(Empty(), tensors)
    whole = encoded.join()
    assert encoded.nbytes == len(whole)
    for step in (1, 13, 64, 4096, 10_000):
        pieces = [b"".join(encoded.cut(at, step)) for at in range(0, len(whole), step)]
        assert b"".join(pieces) == whole
    assert np.shares_memory(np.frombuffer(encoded.parts[2], np.uint8), tensors["a"])
