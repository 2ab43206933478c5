from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from coordinator.rollout import install, predict, roll_out
from edge_teacher.contract.errors import (
    Busy,
    CheckFailed,
    Malformed,
    NotAllowed,
    NotFound,
    RuntimeFailed,
    UsageError,
)
from edge_teacher.contract.limits import UPLOAD_BYTES, Limits
from edge_teacher.contract.messages import (
    Received,
    StudentOffer,
    StudentOffered,
    StudentStatus,
)
from edge_teacher.rpc.serve import Answer, Method, Server, Tensors
from tests.coordinator.fleet_of_agents import world
from tests.edge_teacher.nets import CLASSES, STRANGER, TASK, pictures, student, student_answers

IMAGES = pictures(10)


def test_installed_and_asked(tmp_path: Path) -> None:
    with world(tmp_path, limits=Limits(max_images_per_block=4)) as here:
        device = here.add("d1")
        status = install(here.caller, "d1", *student())
        assert (status.state, status.active_version) == ("active", 1)
        found = predict(here.caller, device, TASK, IMAGES)
        assert np.allclose(found.logits, student_answers(IMAGES), atol=1e-5)
        assert (found.classes, found.version) == (CLASSES, 1)
        assert found.compute_ms > 0


def test_a_large_bundle_goes_in_pieces_from_where_it_stopped(tmp_path: Path) -> None:
    card, bundle = student(filler=3 * UPLOAD_BYTES)
    with world(tmp_path, "d1") as here:
        begun = np.frombuffer(bundle[:UPLOAD_BYTES], np.uint8)
        offer = StudentOffer(
            task=TASK,
            version=1,
            digest=hashlib.sha256(bundle).hexdigest(),
            total_bytes=len(bundle),
        )
        here.caller.call("d1", "student.offer", offer, {"data": begun}, answer=StudentOffered)
        assert install(here.caller, "d1", card, bundle).active_version == 1
        sent = here.caller.wire["d1"]["student.offer"].sent
        assert len(bundle) < sent < len(bundle) + 5000  # nothing twice


def test_again_costs_next_to_nothing(tmp_path: Path) -> None:
    card, bundle = student(filler=UPLOAD_BYTES)
    with world(tmp_path, "d1") as here:
        install(here.caller, "d1", card, bundle)
        sent = here.caller.wire["d1"]["student.offer"].sent
        assert install(here.caller, "d1", card, bundle).active_version == 1
        assert here.caller.wire["d1"]["student.offer"].sent < sent + 1000


def test_what_a_device_refuses_is_raised(tmp_path: Path) -> None:
    with world(tmp_path, "d1") as here:
        with pytest.raises(Malformed, match="not trusted"):
            install(here.caller, "d1", *student(key=STRANGER))
        with pytest.raises(RuntimeFailed, match="canary batch"):
            install(here.caller, "d1", *student(1, order=(1, 0, 2)))
        install(here.caller, "d1", *student(2))
        with pytest.raises(NotAllowed, match="not newer"):
            install(here.caller, "d1", *student(1))
        with pytest.raises(NotFound, match="no student"):
            predict(here.caller, here.agents["d1"].card(), "another task", IMAGES)


DEVICES = [f"d{i}" for i in range(7)]


def test_everybody_gets_it_and_progress_is_told(tmp_path: Path) -> None:
    with world(tmp_path, *DEVICES) as here:
        told: list[int] = []
        done = roll_out(here.caller, DEVICES, *student(), installed=lambda: told.append(1))
        assert sorted(done) == DEVICES
        assert all(status.active_version == 1 for status in done.values())
        assert len(told) == len(DEVICES)


def test_nothing_is_sent_to_others_before_the_canary_device_has_proved_it(tmp_path: Path) -> None:
    with world(tmp_path, *DEVICES) as here:
        roll_out(here.caller, DEVICES, *student())
        topics = [m.topic.split("/")[2:] for m in here.published if "/req/" in m.topic]
        first_other = next(i for i, (device, *_) in enumerate(topics) if device != "d0")
        assert topics[first_other - 1] == ["d0", "req", "student.activate"]


def test_a_canary_device_that_refuses_protects_all_others(tmp_path: Path) -> None:
    with (
        world(tmp_path, *DEVICES) as here,
        pytest.raises(
            CheckFailed, match=r"not installed on d0: .*canary batch.* \(not touched: d1, .*d6\)"
        ),
    ):
        roll_out(here.caller, DEVICES, *student(order=(2, 1, 0)))
    assert {m.topic.split("/")[2] for m in here.published if "/req/" in m.topic} == {"d0"}


def test_a_refusal_halts_after_its_wave_and_names_everybody(tmp_path: Path) -> None:
    with world(tmp_path, *(name for name in DEVICES if name != "d2")) as here:
        here.add("d2", trusts_us=False)
        with pytest.raises(CheckFailed) as caught:
            roll_out(here.caller, DEVICES, *student())
        message = str(caught.value)
        assert message.startswith("version 1 of 'colours' was not installed on d2: ")
        assert message.endswith("(not touched: d5, d6)")
        assert here.asked("d5") == here.asked("d6") == []
        # The rest of the wave has it.
        assert here.agents["d4"].card().students[0].active_version == 1


def test_nobody_to_install_on_is_a_usage_error(tmp_path: Path) -> None:
    with world(tmp_path) as here, pytest.raises(UsageError, match="no device"):
        roll_out(here.caller, [], *student())


def test_a_device_that_keeps_nothing_is_not_sent_it_for_ever(tmp_path: Path) -> None:
    offers: list[int] = []

    def forgets(offer: StudentOffer, _tensors: Tensors) -> Answer:
        offers.append(offer.offset)
        received = Received(next_offset=0, total_bytes=offer.total_bytes)
        return StudentOffered(received=received, status=StudentStatus(task=TASK)), {}

    with world(tmp_path) as here:
        methods = {"student.offer": Method(StudentOffer, forgets)}
        Server(here.broker.connect(), "d1", methods, limits=Limits()).start()
        with pytest.raises(Busy, match="does not keep"):
            install(here.caller, "d1", *student())
        assert len(offers) < 20
