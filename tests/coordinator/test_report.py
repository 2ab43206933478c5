"""The JSON for programs and the page for people, as they lie in the run's folder."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from coordinator.adapted import Adapted
from coordinator.encodings import EncodingCost
from coordinator.report import (
    Accuracy,
    CurvePoint,
    Pictures,
    Report,
    Round,
    Task,
    TaskResult,
    TeacherResult,
    Traffic,
    read_report,
    write_report,
)
from coordinator.report_charts import learning_curves
from coordinator.report_page import duration, headline, percent, points, size
from coordinator.report_pictures import describe, heat_uri, inferno
from coordinator.selection.evidence import GreedySet
from coordinator.selection.strategies import STRATEGIES, ByAttention
from edge_teacher.contract.errors import UsageError
from export.checks.tensorrt import TensorRtVerdict
from export.student_report import FileReport, StudentReport

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "img", "br", "link", "input", "hr"}


def point(stage: str, images_seen: int, accuracy: float | None) -> CurvePoint:
    return CurvePoint(stage=stage, images_seen=images_seen, loss=1.25, accuracy=accuracy)


def a_report(**changes: object) -> Report:
    report = Report(
        command="fedsa demo",
        started="2026-11-22T11:30:12+00:00",
        seed=3,
        broker="mosquitto 2.0.11",
        task=Task(name="birds", classes=("wren", "rook"), probe=50, transfer=4000, test=1000),
        strategy="top-k, k = 1",
        teachers=(
            TeacherResult(
                id="teacher-0",
                score=0.66,
                similarity=0.75,
                probability=0.6,
                selected=True,
                weight=1.0,
                reason="rank 1 of 2, among the 1 best",
                about="residual, 32x32",
            ),
            TeacherResult(
                id="teacher-1",
                score=0.60,
                similarity=0.71,
                probability=0.4,
                selected=False,
                weight=0.0,
                reason="rank 2 of 2, below the 1 best",
            ),
        ),
        rounds=(
            Round(number=1, weights={"teacher-1": 1.0}),
            Round(number=6, weights={"teacher-0": 1.0}),
        ),
        accuracy=Accuracy(
            scratch=0.457,
            fedsa_fp32=0.553,
            fedsa_int8=0.551,
            deployed={"teacher-0": 0.551, "teacher-1": 0.55},
        ),
        curves={
            "scratch": (point("scratch", 1000, 0.3), point("scratch", 2000, 0.457)),
            "fedsa": (
                point("warm-up", 500, 0.25),
                point("round 1", 4500, 0.45),
                point("round 2", 8500, 0.54),
                point("fine-tune", 9000, 0.553),
            ),
        },
        student=StudentReport(
            classes=("wren", "rook"),
            parameters=306830,
            files={
                "student.fp32.onnx": FileReport(1226845, 0.553, 1.0),
                "student.int8.cpu.onnx": FileReport(317964, 0.551, 0.986),
            },
            parity_error=3.2e-7,
            calibration_images=512,
            holdout_images=1000,
            tensorrt=TensorRtVerdict(False, None, None, "not checked: TensorRT is not installed"),
            software={},
        ),
        bytes_on_wire={
            "teacher-0": {
                "saliency": Traffic(sent=2100, received=512_000),
                "features": Traffic(sent=20_000, received=1_728_000),
            },
            "teacher-1": {"saliency": Traffic(sent=2100, received=512_000)},
        },
        encodings={
            "teacher-0": {
                "u8+zstd": EncodingCost(
                    answers=7,
                    bytes_received=410_000,
                    bytes_plain=3_456_000,
                    encode_ms=120,
                    largest_error=0.004,
                    link_bytes_per_s=1.2e6,
                )
            }
        },
        seconds={"scratch": 14.2, "ask": 83.4, "total": 95.0},
        config={"seed": 3, "selection": {"k": 1, "adaptive": True}, "data": {"test": ""}},
        software={"torch": "2.13.0"},
    )
    return msgspec.structs.replace(report, **changes)


def some_pictures() -> Pictures:
    random = np.random.default_rng(0)
    return Pictures(
        images=random.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8),
        student=random.random((3, 8, 8), dtype=np.float32),
        teachers={f"teacher-{i}": random.random((3, 6, 6), dtype=np.float32) for i in range(2)},
        similarities={f"teacher-{i}": np.full(3, 0.5 + i / 4) for i in range(2)},
        labels=("wren", "rook", "wren"),
    )


def bare_report() -> Report:
    """What the least of all runs leaves: no test set, no export, no network, nothing measured."""
    return Report(
        command="fedsa train",
        started="yesterday",
        seed=0,
        broker=None,
        task=Task(name="birds", classes=("wren", "rook"), probe=50, transfer=4000),
        strategy="all",
        teachers=(),
    )


class Page(HTMLParser):
    """The page as tags and text; `balanced` if every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.balanced = True
        self.feed(html)
        self.balanced = self.balanced and not self._open
        self.text = re.sub(r"\s+", " ", " ".join(self.words).replace("\u202f", " "))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        self.balanced = self.balanced and bool(self._open) and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def html(tmp_path: Path) -> str:
    write_report(a_report(), some_pictures(), tmp_path)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_json_has_what_programs_read(tmp_path: Path) -> None:
    write_report(a_report(), some_pictures(), tmp_path)
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["broker"] == "mosquitto 2.0.11"
    assert [(t["id"], t["selected"]) for t in document["teachers"]] == [
        ("teacher-0", True),
        ("teacher-1", False),
    ]
    assert {"score", "probability", "weight"} <= document["teachers"][0].keys()
    assert document["accuracy"]["scratch"] == 0.457
    assert document["accuracy"]["fedsa_fp32"] == 0.553
    assert document["accuracy"]["fedsa_int8"] == 0.551
    assert document["accuracy"]["deployed"] == {"teacher-0": 0.551, "teacher-1": 0.55}
    assert document["bytes_on_wire"]["teacher-1"] == {
        "saliency": {"sent": 2100, "received": 512000}
    }
    assert document["seconds"] == {"scratch": 14.2, "ask": 83.4, "total": 95.0}
    assert read_report(tmp_path) == a_report()


def test_only_whole_files_are_left(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "new"
    write_report(a_report(), None, run_dir)
    write_report(a_report(seed=4), None, run_dir)
    assert sorted(p.name for p in run_dir.iterdir()) == ["report.html", "report.json"]
    assert read_report(run_dir).seed == 4


@pytest.mark.parametrize("content", [None, b"{", b'{"format": 2}'])
def test_a_report_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"report\.json"):
        read_report(tmp_path)


def test_page_says_the_result_and_every_number(html: str) -> None:
    page = Page(html)
    assert page.balanced
    for words in (
        "Asking 1 of 2 private teachers took the student from 45.7 % to 55.3 %.",
        "As INT8 on 2 devices, it answers 55.0 % right (55.0 % to 55.1 %).",
        "+9.6 points",
        "INT8 on teacher-1",
        "rank 2 of 2, below the 1 best",
        "2 selections were made",
        "From scratch 45.7 %",
        "2 rounds",
        "306 830 parameters",
        "not checked: TensorRT is not installed",
        "1.7 MB",
        "u8+zstd",
        "410 kB",
        "3.5 MB",
        "1.2 MB/s",
        "1 min 23 s",
        "1 min 35 s",  # the whole run, not the sum
        "2 stages",
        "selection.adaptive",
        "seed 3, broker mosquitto 2.0.11",
        "2026-11-22 11:30 UTC",
    ):
        assert words in page.text, words


def test_page_is_accessible(html: str) -> None:
    page = Page(html)
    assert page.all("html")[0]["lang"] == "en"
    images = page.all("img")
    assert len(images) == 3 * 3 + 1
    assert all(image["alt"] for image in images)
    assert {header["scope"] for header in page.all("th")} == {"col", "row"}
    assert all(svg["role"] == "img" and svg["aria-labelledby"] for svg in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert labelled <= set(ids)
    # What scrolls can be reached and scrolled from the keyboard.
    sheets = [d for d in page.all("div") if d.get("class", "") in ("sheet", "sheet grid")]
    assert all(sheet["tabindex"] == "0" and sheet["role"] == "region" for sheet in sheets)


def test_colours_have_contrast_in_light_and_dark(html: str) -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    schemes = [
        dict(re.findall(r"--(\w[\w-]*): (#\w{6})", r))
        for r in re.findall(r":root \{(.*?)\}", html, re.S)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        on = [("ink", "paper"), ("ink", "card"), ("soft", "paper"), ("soft", "card")]
        on += [("soft", "wash"), ("soft", "mark-wash"), ("mark", "mark-wash")]
        on += [(tone, "card") for tone in ("fedsa", "scratch", "head", "device")]
        for front, back in on:
            light, dark = sorted((luminance(scheme[front]), luminance(scheme[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_page_asks_nothing_of_anyone(html: str) -> None:
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    addresses = [a[k] for _, a in page.tags for k in ("src", "href", "data", "srcset") if k in a]
    addresses += re.findall(r"url\(\"?([^)\"]*)", html)
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert "default-src 'none'" in policy


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    report = a_report(
        teachers=tuple(
            msgspec.structs.replace(t, id=t.id + HOSTILE, about=HOSTILE, reason=HOSTILE)
            for t in a_report().teachers
        ),
        broker=HOSTILE,
        strategy=HOSTILE,
        config={HOSTILE: HOSTILE},
        seconds={HOSTILE: 1.0},
        bytes_on_wire={HOSTILE: {HOSTILE: Traffic(sent=1, received=1)}},
        curves={HOSTILE: (point(HOSTILE, 1, 0.1), point(HOSTILE, 2, 0.2))},
    )
    pictures = replace(some_pictures(), labels=(HOSTILE,) * 3)
    write_report(report, pictures, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.balanced
    assert not page.all("script")
    assert page.text.count("alert(") > 10


def test_what_was_not_part_of_a_run_is_said(tmp_path: Path) -> None:
    write_report(bare_report(), None, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.balanced
    for words in (
        "how well it does was not measured",
        "The student was not deployed in this run.",
        "No test set was given",
        "No teacher took part",
        "No saliency maps were kept",
        "Accuracy was not followed",
        "Exporting the student was not part of this run.",
        "No device was asked over a network",
        "Times were not taken",
        "no broker",
        "all defaults",
        "yesterday",
    ):
        assert words in page.text, words
    assert "None" not in page.text
    assert "nan" not in page.text
    assert read_report(tmp_path).accuracy.deployed is None


def test_a_teacher_without_maps_leaves_its_cells_empty(tmp_path: Path) -> None:
    pictures = some_pictures()
    write_report(
        a_report(),
        replace(pictures, teachers={"teacher-0": pictures.teachers["teacher-0"]}),
        tmp_path,
    )
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("no map") == 3
    assert "The number is the likeness" in page.text


def test_numbers_under_the_maps_are_explained_only_where_they_stand(tmp_path: Path) -> None:
    write_report(a_report(), replace(some_pictures(), similarities={}), tmp_path)
    assert "The number is the likeness" not in (tmp_path / "report.html").read_text("utf-8")


def several_tasks() -> Report:
    teachers = a_report().teachers
    birds = TaskResult(
        name="birds",
        kind="single-label",
        classes=("wren", "rook"),
        probe=30,
        metric="accuracy",
        metrics={"scratch": {"accuracy": 0.4}, "fedsa": {"accuracy": 0.6}},
        accuracy=Accuracy(fedsa_int8=0.59, deployed={"teacher-0": 0.58, "teacher-1": 0.592}),
        teachers=teachers,
    )
    fields = msgspec.structs.replace(
        birds,
        name="fields",
        kind="dense",
        metric="mean_iou",
        metrics={"fedsa": {"mean_iou": 0.5, "pixel_accuracy": 0.71}},
        accuracy=Accuracy(),
        teachers=tuple(
            msgspec.structs.replace(t, selected=not t.selected, weight=1 - t.weight, reason="odd")
            for t in teachers
        ),
    )
    return a_report(tasks=(birds, fields), metric="mean over 2 tasks of accuracy or mean IoU")


def test_several_tasks_each_have_their_numbers_and_their_teachers(tmp_path: Path) -> None:
    write_report(several_tasks(), some_pictures(), tmp_path)
    page = text_of((tmp_path / "report.html").read_text())
    assert "took a student of 2 tasks from 45.7 % to 55.3 % on average." in page
    assert "accuracy (birds), mean IoU (fields)" in page
    assert "58.0 % to 59.2 %" in page  # of birds, on the devices
    assert page.index("For birds") < page.index("rank 1 of 2") < page.index("For fields")
    assert page.index("For fields") < page.index("odd")
    # Said where the table begins, and not as the name of a column.
    assert "mean over 2 tasks of" not in page


def test_what_was_learnt_of_weights_and_kept_of_the_fine_tuning(tmp_path: Path) -> None:
    adapted = Adapted(held_out=10, epoch=1, epochs=2, scores=(0.5, 0.6, 0.4), metric="F1")
    write_report(a_report(learnt={"teacher-0": 0.87}, adapted=adapted), None, tmp_path)
    page = text_of((tmp_path / "report.html").read_text())
    assert "0.87" in page
    assert "The fine-tuning ended with the weights it had after epoch 1: by F1, 60.0% on 10" in page
    assert read_report(tmp_path).adapted == adapted


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_score_is_said_to_be_what_its_strategy_scores(name: str, tmp_path: Path) -> None:
    write_report(a_report(strategy=name), None, tmp_path)
    page = text_of((tmp_path / "report.html").read_text())
    said = {
        "likeness": "says how far it looks where the student looks" in page,
        "nats": "tell about the labels" in page and "in nats per image and class" in page,
        "truth": "by a linear probe on the test set" in page,
    }
    strategy = STRATEGIES[name]
    if isinstance(strategy, ByAttention):
        expected = "likeness"
    else:
        expected = "nats" if isinstance(strategy, GreedySet) else "truth"
    assert [what for what, there in said.items() if there] == [expected]
    assert ("pooled where it looks" in page) == strategy.under_saliency


def test_the_number_under_a_name_is_the_likeness_that_the_text_speaks_of(tmp_path: Path) -> None:
    pictures = replace(some_pictures(), likeness={"teacher-0": 0.815, "teacher-1": 0.643})
    write_report(a_report(), pictures, tmp_path)
    grid = (tmp_path / "report.html").read_text().split('id="saliency"')[1].split("</thead>")[0]
    assert re.findall(r"<small>(.*?)</small>", grid) == ["0.81", "0.64"]
    assert "its mean over all probe images" in grid


def text_of(page: str) -> str:
    body = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).replace("\u202f", " ").split())


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (
            Accuracy(scratch=0.5, fedsa_fp32=0.45),
            "did not help: the student fell from 50.0 % to 45.0",
        ),
        (Accuracy(fedsa_fp32=0.45), "is right on 45.0 % of the test images"),
        (Accuracy(scratch=0.5), "was not measured"),
    ],
)
def test_headline_does_not_flatter(accuracy: Accuracy, words: str) -> None:
    assert words in headline(a_report(accuracy=accuracy)).replace("\u202f", " ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 8, 8, 3), np.float32)}, "float32"),
        ({"student": np.zeros((2, 4, 4), np.float32)}, "of the student"),
        ({"teachers": {"t": np.zeros((3, 4), np.float32)}}, "maps of t"),
        ({"similarities": {"t": np.zeros(2)}}, "similarities of t"),
        ({"labels": ("one",)}, "1 labels for 3"),
    ],
)
def test_pictures_that_do_not_belong_together_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        replace(some_pictures(), **changes)


def test_heat_shines_where_the_map_is_high_and_is_smooth_between() -> None:
    saliency = np.zeros((4, 4), np.float32)
    saliency[0, 3] = 1
    picture = Image.open(io.BytesIO(b64decode(heat_uri(saliency).partition(",")[2])))
    assert picture.size == (96, 96)
    rgba = np.asarray(picture.convert("RGBA")).astype(int)
    brightness = rgba[..., :3].sum(-1)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert row < 24
    assert column >= 72
    assert brightness[80, 10] < 10
    assert 100 < rgba[80, 10, 3] < 180
    along = brightness[6, 48:90]
    assert (np.diff(along) >= 0).all()
    assert len(set(along.tolist())) > 10


def test_colour_map_grows_lighter_all_the_way() -> None:
    colours = inferno(np.linspace(0, 1, 50)).astype(float)
    assert (np.diff(colours @ [0.2126, 0.7152, 0.0722]) > 0).all()


@pytest.mark.parametrize(
    ("cell", "words"), [((0, 0), "top left"), ((1, 1), "centre"), ((2, 1), "bottom centre")]
)
def test_maps_are_described(cell: tuple[int, int], words: str) -> None:
    saliency = np.zeros((3, 3), np.float32)
    assert describe(saliency) == "nowhere"
    saliency[cell] = 1
    assert describe(saliency) == words


def test_chart_keeps_everything_inside_and_labels_apart() -> None:
    for width in (920.0, 360.0):
        chart = learning_curves(a_report().curves, "fedsa", width, 300)
        assert chart is not None
        left, top, right, bottom = chart.plot
        for line in chart.lines:
            numbers = [float(n) for n in re.findall(r"[\d.]+", line.path)]
            assert all(left <= x <= right for x in numbers[::2])
            assert all(top <= y <= bottom for y in numbers[1::2])
        assert [band.name for band in chart.bands] == ["warm-up", "2 rounds", "fine-tune"]
        assert sum(band.width for band in chart.bands) == pytest.approx(right - left, abs=0.5)
        spans = [(b.label_y, b.label_x, b.label_x + 6 * len(b.name)) for b in chart.bands]
        assert all(end <= width for _, _, end in spans)
        for (y0, _, end), (y1, begin, _) in pairwise(spans):
            assert y0 != y1 or end <= begin
        scratch = next(line for line in chart.lines if line.name == "scratch")
        assert scratch.extension.endswith(f"H{right}")


def test_a_flat_or_unmeasured_curve_is_no_trouble() -> None:
    assert (
        learning_curves({"fedsa": (point("a", 1, None), point("a", 2, 0.5))}, "fedsa", 360, 200)
        is None
    )
    assert learning_curves({"fedsa": (point("a", 1, 1.0), point("a", 2, 1.0))}, "fedsa", 360, 200)


def test_numbers_for_people() -> None:
    shown = [percent(0.5512), points(0.0961), points(-0.002), points(0.0001)]
    assert shown == ["55.1\u202f%", "+9.6\u202fpoints", "\u22120.2\u202fpoints", "0.0\u202fpoints"]
    assert [size(999), size(1000), size(317_964), size(1_400_000), size(999_999)] == [
        "999\u202fB",
        "1.0\u202fkB",
        "318\u202fkB",
        "1.4\u202fMB",
        "1.0\u202fMB",
    ]
    assert [duration(4.14), duration(59.7), duration(83.4)] == [
        "4.1\u202fs",
        "1\u202fmin 0\u202fs",
        "1\u202fmin 23\u202fs",
    ]


def console_of(page: Path, profile: Path) -> list[str]:
    """What Chromium says on the console while it shows `page`, network and all."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not on PATH")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        [
            chromium,
            *flags.split(),
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "To do it again" in done.stdout
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_has_nothing_to_complain_of(html: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert console_of(page, tmp_path / "profile") == []
    # The same eyes see a request that would leave the page: the page's own policy blocks it aloud.
    page.write_text(html.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png" alt="x">'))
    (complaint,) = console_of(page, tmp_path / "profile")
    assert "Content Security Policy" in complaint
