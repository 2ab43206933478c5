from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_teacher import files
from edge_teacher.bundle import StudentCard
from edge_teacher.contract.errors import (
    CheckFailed,
    FedsaError,
    Malformed,
    NotAllowed,
    NotFound,
    TooLarge,
    UsageError,
)
from edge_teacher.contract.messages import Received, StudentOffer, StudentStatus
from edge_teacher.runtime import LiveSession, Model, open_session
from edge_teacher.slots import Students
from edge_teacher.slots.students import MAX_TASKS
from tests.edge_teacher.nets import (
    COORDINATOR,
    OWNER,
    STRANGER,
    TASK,
    pictures,
    student,
    student_answers,
    teacher_bundle,
)

PIECE = 1000


def load(model: Model) -> LiveSession:
    return open_session(model, threads=1)


def open_students(folder: Path, *, dialects: tuple[str, ...] = ("int8_cpu", "fp32")) -> Students:
    return Students(
        folder,
        [COORDINATOR.public_key()],
        load,
        dialects=dialects,
        max_bundle_bytes=1 << 20,
    )


@pytest.fixture
def students(tmp_path: Path) -> Students:
    return open_students(tmp_path)


Made = tuple[StudentCard, bytes]


def offer_of(made: Made, offset: int = 0, **changes: object) -> StudentOffer:
    card, bundle = made
    fields = {
        "task": card.task,
        "version": card.version,
        "digest": hashlib.sha256(bundle).hexdigest(),
        "total_bytes": len(bundle),
        "offset": offset,
        **changes,
    }
    return StudentOffer(**fields)  # type: ignore[arg-type]


def send(students: Students, made: Made, piece: int = 1 << 20) -> Received:
    """As a coordinator does: ask first, then go on where the device stands."""
    received = students.offer(offer_of(made), b"")
    while received.next_offset < received.total_bytes:
        begin = received.next_offset
        received = students.offer(offer_of(made, begin), made[1][begin : begin + piece])
        assert received.next_offset > begin
    return received


def install(students: Students, made: Made) -> StudentStatus:
    send(students, made)
    students.activate(made[0].task, made[0].version)
    return students.status(made[0].task)


def versions(students: Students, task: str = TASK) -> tuple[int, int, int]:
    """(previous, active, candidate)"""
    status = students.status(task)
    return status.previous_version, status.active_version, status.candidate_version


def answers_rightly(students: Students, task: str = TASK) -> int:
    """The version that answers."""
    active = students.active(task)
    images = pictures(7)
    logits = active.session.run(images, ["logits"])["logits"]
    assert np.allclose(logits, student_answers(images), atol=1e-5)
    return active.card.version


V1, V2, V3 = (student(version) for version in (1, 2, 3))


class TestOffer:
    def test_in_pieces(self, students: Students) -> None:
        made = student(filler=3000)
        received = students.offer(offer_of(made), made[1][:PIECE])
        assert (received.next_offset, received.total_bytes) == (PIECE, len(made[1]))
        assert students.status(TASK).state == "downloading"
        assert send(students, made, PIECE).next_offset == len(made[1])
        status = students.status(TASK)
        assert (status.state, status.candidate_version) == ("verified", 1)
        with pytest.raises(NotFound, match="active: none"):
            students.active(TASK)

    def test_is_resumed_after_a_restart_without_sending_anything_twice(
        self, tmp_path: Path
    ) -> None:
        made = student(filler=3000)
        open_students(tmp_path).offer(offer_of(made), made[1][:PIECE])
        again = open_students(tmp_path)
        assert again.offer(offer_of(made), b"").next_offset == PIECE
        send(again, made)
        assert again.status(TASK).state == "verified"

    def test_a_piece_out_of_its_place_is_ignored(self, students: Students) -> None:
        made = student(filler=3000)
        for offset in (PIECE, -1, 1):
            found = students.offer(offer_of(made, offset), made[1][:PIECE])
            assert found.next_offset == 0
        students.offer(offer_of(made), made[1][:PIECE])
        assert students.offer(offer_of(made), made[1][:PIECE]).next_offset == PIECE
        assert send(students, made).next_offset == len(made[1])

    def test_another_offer_takes_the_place_of_an_unfinished_one(
        self, students: Students, tmp_path: Path
    ) -> None:
        first = student(filler=3000)
        students.offer(offer_of(first), first[1][:PIECE])
        students.offer(offer_of(V2), V2[1][:PIECE])
        assert [p.stat().st_size for p in tmp_path.rglob("*.part")] == [PIECE]
        assert students.offer(offer_of(first), b"").next_offset == 0

    def test_again_when_it_is_installed_sends_nothing(self, students: Students) -> None:
        send(students, V1)
        assert students.offer(offer_of(V1), b"").next_offset == len(V1[1])
        students.activate(TASK, 1)
        assert students.offer(offer_of(V1), b"").next_offset == len(V1[1])
        assert versions(students) == (0, 1, 0)

    @pytest.mark.parametrize("version", [2, 1, 0, -1])
    def test_a_version_that_is_not_newer_is_not_taken(
        self, students: Students, version: int
    ) -> None:
        install(students, V2)
        other = student(version, filler=10)  # for 2: the same number, another bundle
        with pytest.raises(NotAllowed, match="not newer than 2"):
            students.offer(offer_of(other), b"")
        assert answers_rightly(students) == 2

    def test_not_even_after_a_rollback(self, students: Students) -> None:
        install(students, V1)
        install(students, V3)
        students.rollback(TASK)
        with pytest.raises(NotAllowed, match="not newer than 3"):
            students.offer(offer_of(V2), b"")

    @pytest.mark.parametrize(
        "digest",
        [
            "",
            "../../escaped",
            "/tmp/escaped",
            "A" * 64,
            "0" * 63,
            "0" * 65,
            "0" * 64 + "\n",
            "." * 64,
        ],
    )
    def test_a_digest_that_is_none_never_becomes_a_file(
        self, students: Students, tmp_path: Path, digest: str
    ) -> None:
        with pytest.raises(Malformed, match="no SHA-256"):
            students.offer(offer_of(V1, digest=digest), b"evil")
        assert list(tmp_path.rglob("*")) == []

    @pytest.mark.parametrize("task", ["", "..", "../x", "a/b", "/abs", ".hidden"])
    def test_a_task_that_is_a_path_never_becomes_a_folder(
        self, students: Students, tmp_path: Path, task: str
    ) -> None:
        for ask in (
            lambda: students.offer(offer_of(V1, task=task), b"x"),
            lambda: students.activate(task, 1),
        ):
            with pytest.raises(UsageError, match="no usable id"):
                ask()
        assert list(tmp_path.rglob("*")) == []

    def test_too_many_bytes_are_refused_before_they_are_sent(self, students: Students) -> None:
        with pytest.raises(TooLarge, match=str(1 << 20)):
            students.offer(offer_of(V1, total_bytes=(1 << 20) + 1), b"")

    @pytest.mark.parametrize("total", [0, -1, 3])
    def test_more_bytes_than_announced_are_refused(self, students: Students, total: int) -> None:
        with pytest.raises(CheckFailed):
            students.offer(offer_of(V1, total_bytes=total), V1[1][:PIECE])
        assert send(students, V1).next_offset == len(V1[1])

    @pytest.mark.parametrize(
        "wrong",
        [
            (V1[0], V1[1][:5000] + b"\xff" + V1[1][5001:]),
            (V1[0], V1[1][:-512]),
            (V1[0], b"no bundle at all"),
            student(key=STRANGER),
            student(key=OWNER),
            (V1[0], V2[1]),
            (V1[0], student(task="other")[1]),
            (V1[0], teacher_bundle(key=COORDINATOR)),
            student(graphs={"int8_tensorrt": "student.onnx"}),
            student(graphs={}),
        ],
        ids=[
            "bit",
            "truncated",
            "garbage",
            "stranger",
            "owner",
            "version",
            "task",
            "teacher",
            "dialect",
            "no graph",
        ],
    )
    def test_what_is_wrong_is_refused_and_leaves_nothing(
        self, students: Students, tmp_path: Path, wrong: Made
    ) -> None:
        with pytest.raises(CheckFailed):
            send(students, wrong)
        assert students.status(TASK).state == "failed"
        assert students.status(TASK).problem
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
        assert install(students, V1).active_version == 1

    def test_a_wrong_digest_is_refused_though_the_bundle_is_good(self, students: Students) -> None:
        with pytest.raises(CheckFailed, match="digest"):
            students.offer(offer_of(V1, digest="0" * 64), V1[1])

    def test_a_device_that_trusts_no_coordinator_takes_no_student(self, tmp_path: Path) -> None:
        closed = Students(tmp_path, [], load, dialects=("fp32",), max_bundle_bytes=1 << 20)
        with pytest.raises(NotAllowed, match="takes no students"):
            send(closed, V1)
        assert list(tmp_path.iterdir()) == []


class TestStrangers:
    """Whoever the broker lets through can offer bytes; only a signature makes them a student."""

    def test_an_unsigned_offer_says_nothing_about_the_student_that_answers(
        self, students: Students
    ) -> None:
        install(students, V1)
        junk = offer_of(V2, digest="0" * 64, total_bytes=4)
        students.offer(junk, b"ju")
        assert students.status(TASK).state == "active"
        with pytest.raises(CheckFailed):
            students.offer(msgspec.structs.replace(junk, offset=2), b"nk")
        status = students.status(TASK)
        assert (status.state, status.active_version) == ("active", 1)
        assert "the bundle offered for" in status.problem
        assert answers_rightly(students) == 1

    def test_tasks_of_which_nothing_was_verified_are_not_in_the_card(
        self, students: Students
    ) -> None:
        students.offer(offer_of(V1, task="junk"), V1[1][:PIECE])
        assert students.status("junk").state == "downloading"
        assert students.statuses() == ()

    def test_there_is_an_end_to_tasks(self, students: Students, tmp_path: Path) -> None:
        for number in range(MAX_TASKS):
            students.offer(offer_of(V1, task=f"t{number}"), b"x")
        with pytest.raises(TooLarge, match=f"{MAX_TASKS} tasks"):
            students.offer(offer_of(V1, task="more"), b"x")
        assert not (tmp_path / "more").exists()

    def test_downloads_take_no_more_together_than_one_bundle_may(self, tmp_path: Path) -> None:
        students = open_students(tmp_path)
        most = 1 << 20
        for number in range(5):
            digest = f"{number:064x}"
            offer = StudentOffer(
                task=f"t{number}", version=1, digest=digest, total_bytes=most // 2, offset=0
            )
            students.offer(offer, bytes(most // 2 - 1))
            held = sum(part.stat().st_size for part in tmp_path.rglob("*.part"))
            assert held <= most
        assert (tmp_path / "t4" / f"{4:064x}.part").exists()


class TestActivate:
    def test_the_new_one_answers(self, students: Students) -> None:
        status = install(students, V1)
        assert answers_rightly(students) == 1
        assert (status.state, status.canary_agreement) == ("active", 1.0)
        assert status.runtime_file == "student.onnx"
        assert status.canary_ms_per_image is not None
        assert students.statuses() == (status,)

    def test_what_was_never_offered_is_not_found(self, students: Students) -> None:
        for version in (0, 1):
            with pytest.raises(NotFound, match="offer it first"):
                students.activate(TASK, version)

    def test_the_best_dialect_of_those_it_has(self, students: Students) -> None:
        both = student(
            graphs={"fp32": "filler", "int8_cpu": "student.onnx"},
            canary_logits={"int8_cpu": "canary.logits.npy"},
        )
        assert install(students, both).runtime_file == "student.onnx"

    def test_tasks_do_not_touch_each_other(self, students: Students) -> None:
        install(students, V2)
        install(students, student(1, task="shapes"))
        assert (answers_rightly(students), answers_rightly(students, "shapes")) == (2, 1)
        with pytest.raises(NotFound, match=r"'sounds'.*active: colours, shapes"):
            students.active("sounds")

    LOGITS = student_answers(pictures(20, seed=9))

    @pytest.mark.parametrize(
        "bad",
        [
            student(2, order=(1, 0, 2)),
            student(2, canary=LOGITS[:-1]),
            student(2, canary=LOGITS[:, :2]),
            student(2, canary=LOGITS.reshape(-1)),
            student(2, canary=np.array(["a"])),
            student(2, classes=("red", "green")),
            student(2, canary_logits={}),
            student(2, canary_logits={"fp32": "missing"}),
            student(2, canary_logits={"fp32": "filler"}),
            student(2, canary_images="filler"),
            student(2, canary_images="canary.logits.npy"),
            student(2, graphs={"fp32": "filler"}),
            student(2, graphs={"fp32": "missing"}),
        ],
        ids=[
            "confused",
            "fewer canaries",
            "fewer logits",
            "flat",
            "text",
            "fewer classes",
            "no canary",
            "canary missing",
            "canary no array",
            "images no array",
            "images wrong",
            "graph no graph",
            "graph missing",
        ],
    )
    def test_one_that_fails_its_canary_batch_leaves_the_old_one_answering(
        self, students: Students, tmp_path: Path, bad: Made
    ) -> None:
        install(students, V1)
        with pytest.raises(FedsaError) as caught:
            install(students, bad)
        assert answers_rightly(students) == 1
        status = students.status(TASK)
        assert (status.state, status.problem) == ("failed", str(caught.value))
        assert versions(students) == (0, 1, 2)
        again = open_students(tmp_path)
        assert answers_rightly(again) == 1
        # A better one is taken as if nothing had been.
        assert install(again, V3).active_version == 3
        assert versions(again) == (1, 3, 0)

    def test_the_first_one_that_fails_leaves_none(self, students: Students) -> None:
        with pytest.raises(CheckFailed, match="canary"):
            install(students, student(order=(2, 0, 1)))
        with pytest.raises(NotFound):
            students.active(TASK)
        assert install(students, V2).active_version == 2

    def test_the_share_that_must_agree_is_the_bundle_s(self, students: Students) -> None:
        images = pictures(20, seed=9)
        off = student_answers(images)
        off[0] = -off[0]  # one of twenty answers otherwise
        with pytest.raises(CheckFailed, match=r"95\.0%.*must answer 96\.0%"):
            install(students, student(1, canary=off, canary_agreement=0.96))
        assert install(students, student(2, canary=off, canary_agreement=0.95)).active_version == 2

    def test_again_changes_nothing(self, students: Students) -> None:
        install(students, V1)
        install(students, V2)
        students.activate(TASK, 2)
        assert versions(students) == (1, 2, 0)
        students.rollback(TASK)
        assert answers_rightly(students) == 1


class TestRollback:
    def test_back_to_the_version_before_and_no_further(self, students: Students) -> None:
        install(students, V1)
        install(students, V2)
        students.rollback(TASK)
        assert answers_rightly(students) == 1
        # The other is newer: a candidate again, as after a restart.
        assert versions(students) == (0, 1, 2)
        with pytest.raises(NotFound, match="no previous version"):
            students.rollback(TASK)
        students.activate(TASK, 2)
        assert answers_rightly(students) == 2

    def test_without_any(self, students: Students) -> None:
        with pytest.raises(NotFound, match="no previous version"):
            students.rollback(TASK)
        install(students, V1)
        with pytest.raises(NotFound, match="no previous version"):
            students.rollback(TASK)

    def test_a_candidate_takes_the_place_of_the_previous_and_says_so(
        self, students: Students
    ) -> None:
        install(students, V1)
        install(students, V2)
        assert versions(students) == (1, 2, 0)
        send(students, V3)
        assert versions(students) == (0, 2, 3)
        with pytest.raises(NotFound, match="no previous version"):
            students.rollback(TASK)
        assert answers_rightly(students) == 2


class TestRestart:
    def test_it_answers_as_before(self, tmp_path: Path) -> None:
        before = open_students(tmp_path)
        install(before, V1)
        install(before, V2)
        install(before, student(4, task="shapes"))
        after = open_students(tmp_path)
        assert (answers_rightly(after), answers_rightly(after, "shapes")) == (2, 4)
        assert versions(after) == versions(before) == (1, 2, 0)
        after.rollback(TASK)
        assert versions(open_students(tmp_path)) == versions(after) == (0, 1, 2)

    def test_one_that_waits_for_its_first_activation_still_does(self, tmp_path: Path) -> None:
        send(open_students(tmp_path), V1)
        after = open_students(tmp_path)
        assert versions(after) == (0, 0, 1)
        assert after.status(TASK).state == "verified"
        assert install(after, V1).active_version == 1

    def test_a_damaged_one_is_not_loaded_and_the_next_can_be_installed(
        self, tmp_path: Path
    ) -> None:
        install(open_students(tmp_path), V1)
        (slot,) = tmp_path.rglob("*.fedsa")
        slot.write_bytes(slot.read_bytes()[:-700])
        after = open_students(tmp_path)
        with pytest.raises(NotFound):
            after.active(TASK)
        assert after.status(TASK).state == "failed"
        assert "fedsa" in after.status(TASK).problem
        assert install(after, V2).active_version == 2

    def test_a_damaged_neighbour_hinders_nothing(self, tmp_path: Path) -> None:
        before = open_students(tmp_path)
        install(before, V1)
        install(before, V2)
        (tmp_path / TASK / "A.fedsa").write_bytes(b"rotten")
        for now in (before, open_students(tmp_path)):
            assert answers_rightly(now) == 2
            now.activate(TASK, 2)
            assert versions(now) == (0, 2, 0)
        assert install(now, V3).active_version == 3

    def test_after_the_key_was_changed_the_new_one_s_students_can_be_installed(
        self, tmp_path: Path
    ) -> None:
        install(open_students(tmp_path), V1)
        after = Students(
            tmp_path, [STRANGER.public_key()], load, dialects=("fp32",), max_bundle_bytes=1 << 20
        )
        with pytest.raises(NotFound):
            after.active(TASK)
        assert install(after, student(2, key=STRANGER)).active_version == 2

    def test_what_does_not_belong_there_is_left_alone(self, tmp_path: Path) -> None:
        install(open_students(tmp_path), V1)
        (tmp_path / "lost+found").mkdir()
        (tmp_path / "a file").write_bytes(b"")
        (tmp_path / "empty").mkdir()
        after = open_students(tmp_path)
        assert answers_rightly(after) == 1
        assert [status.task for status in after.statuses()] == [TASK]

    def test_a_link_to_somewhere_else_is_not_followed(self, tmp_path: Path) -> None:
        install(open_students(tmp_path), V1)
        link = tmp_path / TASK / "active"
        link.unlink()
        link.symlink_to("/etc/passwd")
        with pytest.raises(NotFound):
            open_students(tmp_path).active(TASK)


class PowerLossError(BaseException):
    """Nothing on the way may handle it."""


@pytest.fixture
def lose_power(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, bool], None]]:
    """Lose it at the n-th operation on files: before it happens, or just after."""
    left = [-1]
    after = [False]

    def interrupted(real: Callable[..., object]) -> Callable[..., object]:
        def operation(*args: object, **more: object) -> object:
            left[0] -= 1
            now = left[0] == 0
            if now and not after[0]:
                raise PowerLossError
            try:
                return real(*args, **more)
            finally:
                if now:
                    raise PowerLossError

        return operation

    for name in ("replace", "unlink", "symlink_to", "mkdir", "open"):
        monkeypatch.setattr(Path, name, interrupted(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", interrupted(os.fsync))
    monkeypatch.setattr(files.tempfile, "mkstemp", interrupted(files.tempfile.mkstemp))

    def arm(count: int, late: bool) -> None:
        left[0], after[0] = count, late

    yield arm
    left[0] = -1


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("first", [True, False], ids=["first student", "second student"])
def test_an_interruption_at_any_file_operation_leaves_a_working_device(
    tmp_path: Path, lose_power: Callable[[int, bool], None], late: bool, first: bool
) -> None:
    old = 0 if first else 1
    count = 0
    while True:
        count += 1
        folder = tmp_path / f"{count}"
        students = open_students(folder)
        if not first:
            install(students, V1)
        lose_power(count, late)
        try:
            install(students, V2)
        except PowerLossError:
            pass
        else:
            lose_power(-1, False)
            break
        lose_power(-1, False)
        restarted = open_students(folder)
        before = restarted.status(TASK).active_version
        assert before in (old, 2)
        if before:
            assert answers_rightly(restarted) == before
        # What the coordinator does when it asks again:
        assert install(restarted, V2).active_version == 2
        assert answers_rightly(restarted) == 2
        assert versions(open_students(folder)) == (old, 2, 0)
    assert count > 12  # it was interrupted, and often
