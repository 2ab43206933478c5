from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.answers import AnswerStore, Question, RememberedAnswers, image_keys
from coordinator.answers.pruning import Pruned, StoreSummary, Survey, prune, survey
from coordinator.cli import main
from edge_teacher.contract.errors import UsageError
from tests.edge_teacher.nets import pictures

DAY_S = 86400


def question(teacher: str, method: str) -> Question:
    return Question(
        bundle=teacher[-1] * 64, method=method, query='{"form":"pooled"}', image_size=(8, 8)
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Of d1 and d2 two stores each, used 1, 2, 3 and 4 days ago; d1's saliency last."""
    folder = tmp_path / "answers"
    with RememberedAnswers(folder) as cache:
        for teacher in ("d1", "d2"):
            for method, images in (("saliency", 4), ("features", 8)):
                keys = image_keys(pictures(images))
                answers = np.zeros((images, 50), np.float16)
                cache.remember(question(teacher, method), teacher, keys, answers)
    days = 1
    for teacher in ("d1", "d2"):
        for method in ("saliency", "features"):
            used = time.time() - days * DAY_S
            os.utime(store_of(folder, teacher, method) / "in-use", (used, used))
            days += 1
    return folder


def store_of(cache: Path, teacher: str, method: str) -> Path:
    asked = question(teacher, method)
    return cache / asked.bundle / asked.digest[:32]


def names(stores: tuple[StoreSummary, ...]) -> list[str]:
    return sorted(f"{s.teacher} {s.method}" for s in stores)


def test_what_is_there(cache: Path) -> None:
    stores = survey(cache).stores
    assert names(stores) == ["d1 features", "d1 saliency", "d2 features", "d2 saliency"]
    (one,) = [s for s in stores if (s.teacher, s.method) == ("d1", "features")]
    assert one.images == 8
    files = (cache / one.path).iterdir()
    assert one.bytes == sum(f.stat().st_size for f in files) > 8 * 100
    assert one.last_used_unix_s == pytest.approx(time.time() - 2 * DAY_S, abs=60)
    assert not one.in_use


@pytest.mark.parametrize(
    ("days", "removed"),
    [
        (2.5, ["d2 features", "d2 saliency"]),
        (30, []),
        (0, ["d1 features", "d1 saliency", "d2 features", "d2 saliency"]),
    ],
)
def test_by_age(cache: Path, days: float, removed: list[str]) -> None:
    assert names(prune(cache, unused_days=days).removed) == removed
    left = {"d1 features", "d1 saliency", "d2 features", "d2 saliency"} - set(removed)
    assert set(names(survey(cache).stores)) == left


def test_by_size_the_least_recently_used_first(cache: Path) -> None:
    stores = {f"{s.teacher} {s.method}": s.bytes for s in survey(cache).stores}
    keep = stores["d1 saliency"] + stores["d1 features"]
    assert names(prune(cache, keep_bytes=keep + 1).removed) == ["d2 features", "d2 saliency"]
    assert prune(cache, keep_bytes=keep).removed == ()
    assert names(prune(cache, keep_bytes=keep - 1).removed) == ["d1 features"]
    assert names(prune(cache, keep_bytes=0).removed) == ["d1 saliency"]
    assert list(cache.iterdir()) == []


def test_by_teacher(cache: Path) -> None:
    assert names(prune(cache, teachers=["d2"], unused_days=3.5).removed) == ["d2 features"]
    assert names(prune(cache, teachers=["d2"]).removed) == ["d2 saliency"]
    assert names(prune(cache, teachers=["1" * 64]).removed) == ["d1 features", "d1 saliency"]


def test_nobody_is_guessed_and_nothing_goes_unsaid(cache: Path) -> None:
    with pytest.raises(UsageError, match="nothing is remembered of 'd9', only of d1, d2"):
        prune(cache, teachers=["d9"], unused_days=0)
    with pytest.raises(UsageError, match="say what is to go"):
        prune(cache)
    with pytest.raises(UsageError, match="is no folder"):
        survey(cache / "none")
    assert len(survey(cache).stores) == 4


_HOLD = """
import sys
from pathlib import Path
from coordinator.answers import AnswerStore, Question
import msgspec
asked = msgspec.json.decode(sys.argv[2], type=Question)
store = AnswerStore(Path(sys.argv[1]), asked, "d1")
print("open", flush=True)
sys.stdin.read()
"""


def test_what_another_process_has_open_is_never_touched(cache: Path) -> None:
    folder = store_of(cache, "d1", "saliency")
    asked = msgspec.json.encode(question("d1", "saliency")).decode()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), asked],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        done = prune(cache, keep_bytes=0)
        assert names(done.kept) == ["d1 saliency"]
        assert len(done.removed) == 3
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert survey(cache).stores[0].in_use
    finally:
        holder.communicate()
    assert names(prune(cache, keep_bytes=0).removed) == ["d1 saliency"]


def test_who_opens_what_is_being_pruned_begins_anew(cache: Path) -> None:
    folder = store_of(cache, "d1", "saliency")
    prune(cache, teachers=["d1"])
    store = AnswerStore(folder, question("d1", "saliency"), "d1")
    keys = image_keys(pictures(3))
    assert (store.find(keys) == -1).all()
    store.append(keys, np.ones((3, 2), np.float16))
    assert (store.find(keys) >= 0).all()


class TestCommand:
    def run(self, *arguments: object) -> int:
        return main(["cache", *map(str, arguments)])

    def test_show(self, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("show", "--answers", cache, "--json") == 0
        found = msgspec.json.decode(capsys.readouterr().out, type=Survey)
        assert found == survey(cache)
        assert self.run("show", "--answers", cache) == 0
        shown = capsys.readouterr().out
        for words in ("d1", "d2", "saliency", "pooled", "3 days ago"):
            assert words in shown

    def test_prune(self, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("prune", "--answers", cache, "--unused-days", 2.5, "--json") == 0
        done = msgspec.json.decode(capsys.readouterr().out, type=Pruned)
        assert names(done.removed) == ["d2 features", "d2 saliency"]
        assert self.run("prune", "--answers", cache, "--keep-bytes", "1k") == 0
        assert "Removed 1 store," in capsys.readouterr().out

    def test_what_is_in_use_is_exit_code_1(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        open_one = AnswerStore(store_of(cache, "d1", "saliency"), question("d1", "saliency"), "d1")
        assert self.run("prune", "--answers", cache, "--teacher", "d1") == 1
        assert "is in use" in capsys.readouterr().err
        open_one.close()

    def test_what_is_no_store_is_exit_code_1(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (store_of(cache, "d1", "saliency") / "question.json").write_text("nonsense")
        assert self.run("show", "--answers", cache) == 1
        assert "no store of answers" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "wrong",
        [
            (),
            ("--keep-bytes", "much"),
            ("--keep-bytes", "-1"),
            ("--unused-days", "nan"),
            ("--teacher", "d9"),
        ],
    )
    def test_wrong_usage_is_exit_code_2(
        self, cache: Path, wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        try:
            code = self.run("prune", "--answers", cache, *wrong)
        except SystemExit as ended:  # argparse
            code = int(str(ended.code))
        assert code == 2
        assert "Traceback" not in capsys.readouterr().err
        assert len(survey(cache).stores) == 4
