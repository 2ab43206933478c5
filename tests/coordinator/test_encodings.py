from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.answers import RememberedAnswers
from coordinator.encodings import Encoding, EncodingLedger, choose
from coordinator.teachers import RemoteTeacher
from edge_teacher.rpc.traffic import Traffic
from tests.coordinator.fleet_of_agents import world
from tests.edge_teacher.nets import pictures, teacher_answers

IMAGES = pictures(10)


@pytest.mark.parametrize(
    ("speed", "offer", "expected"),
    [
        (None, ("f16", "f32", "u8", "zstd"), "f16"),
        (500e6, ("f16", "f32", "u8", "zstd"), "f16"),
        (50e6, ("f16", "f32", "u8", "zstd"), "f16+zstd"),
        (50e6, ("f16", "f32", "u8"), "f16"),
        (1e6, ("f16", "f32", "u8", "zstd"), "u8+zstd"),
        (1e6, ("f16", "f32", "u8"), "u8"),
        (1e6, ("f16", "f32"), "f16"),
    ],
)
def test_by_the_speed_and_from_the_offer(
    tmp_path: Path, speed: float | None, offer: tuple[str, ...], expected: str
) -> None:
    with world(tmp_path) as here:
        card = msgspec.structs.replace(here.add("d1"), encodings=offer)
    assert str(choose(card, speed)) == expected


def test_a_device_offers_what_it_has(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        assert here.add("d1").encodings == ("f16", "f32", "u8", "zstd")


def test_on_a_slow_link_the_answers_are_smaller_nearly_the_same_and_on_record(
    tmp_path: Path,
) -> None:
    features, saliency = teacher_answers(IMAGES)
    with world(tmp_path) as here:
        card, ledger = here.add("d1"), EncodingLedger()
        fast = RemoteTeacher(here.caller, card, RememberedAnswers(tmp_path / "fast"), ledger)
        assert np.allclose(fast.features(IMAGES), features, atol=1e-3)
        here.caller.traffic.measured("d1", 1 << 20, 1.0)
        slow = RemoteTeacher(here.caller, card, RememberedAnswers(tmp_path / "slow"), ledger)
        found = slow.features(IMAGES)
        assert np.abs(found - features).max() <= 0.6 * np.ptp(features) / 255 + 1e-3
        assert np.abs(slow.saliency(IMAGES) - saliency).max() <= 0.6 / 255 + 1e-3
        costs = ledger.costs()["d1"]
        assert costs.keys() == {"f16", "u8+zstd"}
        assert costs["f16"].answers == 1
        assert costs["f16"].largest_error < 1e-3
        quantised = costs["u8+zstd"]
        assert quantised.answers == 2
        assert quantised.link_bytes_per_s == pytest.approx(1 << 20)
        assert 0 < quantised.largest_error < 0.02
        assert quantised.encode_ms > 0
        assert quantised.bytes_received < 0.6 * quantised.bytes_plain
        # However it travelled, it is the answer to the same question.
        again = RemoteTeacher(here.caller, card, RememberedAnswers(tmp_path / "slow"), ledger)
        assert np.array_equal(again.features(IMAGES), found)
        assert ledger.costs()["d1"]["u8+zstd"].answers == 2


def test_the_ledger_adds_up_by_device_and_encoding() -> None:
    assert str(Encoding(dtype="u8", packed=True)) == "u8+zstd"
    assert EncodingLedger().costs() == {}


class TestSpeed:
    def test_unknown_before_enough_has_moved(self) -> None:
        traffic = Traffic()
        assert traffic.speed("d1") is None
        traffic.measured("d1", 1000, 1e-6)
        traffic.measured("d1", 1 << 20, 0.0)
        assert traffic.speed("d1") is None

    def test_it_follows_the_latest(self) -> None:
        traffic = Traffic()
        traffic.measured("d1", 1_000_000, 1.0)
        assert traffic.speed("d1") == 1e6
        for _ in range(20):
            traffic.measured("d1", 1_000_000, 0.1)
        assert traffic.speed("d1") == pytest.approx(1e7, rel=0.01)
        assert traffic.speed("d2") is None
