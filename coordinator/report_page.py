"""From a `Report` to the page: what is said in words, and the numbers laid out for the template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from coordinator.adapted import in_words
from coordinator.report import (
    TOTAL,
    Pictures,
    Report,
    TaskResult,
    TeacherResult,
    Traffic,
    metric_name,
)
from coordinator.report_charts import Chart, learning_curves
from coordinator.report_pictures import describe, heat_uri, legend_uri, photograph_uri
from export.student_report import StudentReport

_NAMES = {"scratch": "From scratch", "fedsa": "FedSA"}
_THIN = "\u202f"  # narrow, and no line breaks at it
_MINUS = "\u2212"


@dataclass(frozen=True)
class Row:
    """A line of the accuracy table. `kind` picks its colour."""

    name: str
    note: str
    accuracy: float
    kind: str


@dataclass(frozen=True)
class Cell:
    """One saliency map: the picture, what it shows in words, and how like the student's it is."""

    uri: str
    words: str
    similarity: float | None


@dataclass(frozen=True)
class Selected:
    """The last selection for a task, with the bar of each teacher's score; no name, of the only one."""

    task: str
    teachers: tuple[TeacherResult, ...]
    bars: dict[str, float]


@dataclass(frozen=True)
class Photograph:
    """One row of the grid: an image, the student's map and each teacher's (None: it has none)."""

    uri: str
    label: str
    student: Cell
    teachers: tuple[Cell | None, ...]


def render(report: Report, pictures: Pictures | None) -> str:
    """The whole page as HTML; the same report gives the same page."""
    environment = Environment(
        loader=PackageLoader("coordinator", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "bytes": size,
        "seconds": duration,
        "count": count,
        "value": value,
        "moment": moment,
        "metric": metric_name,
        "deployed_range": deployed_range,
    }
    stages = {stage: taken for stage, taken in report.seconds.items() if stage != TOTAL}
    page: str = environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        deployed_line=deployed_line(report),
        accuracies=accuracy_rows(report),
        charts=_charts(report),
        curve_names=_NAMES,
        photographs=_photographs(report, pictures),
        legend=legend_uri(),
        lost=lost_lines(report),
        numbered=pictures is not None and bool(pictures.similarities),
        methods=methods(report),
        totals={device: total(by_method) for device, by_method in report.bytes_on_wire.items()},
        settings=settings(report.config),
        several=len(report.tasks) > 1,
        selections=selections(report),
        adapted=None if report.adapted is None else in_words(report.adapted),
        likeness={} if pictures is None else pictures.likeness,
        students=students(report),
        stages=stages,
        # Some stages overlap and some time lies between them: the whole is measured, not summed.
        whole=report.seconds.get(TOTAL, sum(stages.values())),
    )
    return page


def headline(report: Report) -> str:
    """The result in one sentence."""
    accuracy = report.accuracy
    chosen, there = sum(t.selected for t in report.teachers), len(report.teachers)
    asked = f"{chosen} of {there} private teacher{'s' * (there != 1)}"
    if accuracy.fedsa_fp32 is None:
        return f"A student learnt from {asked}; how well it does was not measured in this run."
    reached = percent(accuracy.fedsa_fp32)
    if len(report.tasks) > 1:
        # What the tasks are measured by may differ: the names are with the numbers.
        tasks = f"{len(report.tasks)} tasks"
        if accuracy.scratch is None:
            return f"A student of {tasks} that learnt from {asked} has {reached} on average."
        start, fell = percent(accuracy.scratch), accuracy.fedsa_fp32 < accuracy.scratch
        if fell:
            return (
                f"Asking {asked} did not help: over its {tasks} the student fell from {start} to "
                f"{reached} on average."
            )
        return f"Asking {asked} took a student of {tasks} from {start} to {reached} on average."
    if report.metric != "accuracy":
        reached = f"{reached} {metric_name(report.metric)}"
    if accuracy.scratch is None:
        if report.metric != "accuracy":
            return f"A student that learnt from {asked} has {reached} on the test images."
        return f"A student that learnt from {asked} is right on {reached} of the test images."
    gain = accuracy.fedsa_fp32 - accuracy.scratch
    start = percent(accuracy.scratch)
    if gain < 0:
        return f"Asking {asked} did not help: the student fell from {start} to {reached}."
    return f"Asking {asked} took the student from {start} to {reached}."


def deployed_line(report: Report) -> str:
    """What became of the INT8 student on the devices, in one sentence."""
    deployed = report.accuracy.deployed
    if deployed is None:
        return "The student was not deployed in this run."
    if not deployed:
        return "The student was offered to devices, and none answered with it."
    devices = f"{len(deployed)} devices" if len(deployed) > 1 else "the device"
    low, high = percent(min(deployed.values())), percent(max(deployed.values()))
    mean = percent(fmean(deployed.values()))
    spread = "" if low == high else f" ({low} to {high})"
    if len(report.tasks) > 1:
        return f"As INT8 on {devices}, it has {mean} on average over its tasks{spread}."
    if report.metric != "accuracy":
        return f"As INT8 on {devices}, it has {mean} {metric_name(report.metric)}{spread}."
    return f"As INT8 on {devices}, it answers {mean} right{spread}."


def students(report: Report) -> list[tuple[str, StudentReport]]:
    """Every student that was exported, under its task's name."""
    if report.student is not None:
        return [(report.task.name, report.student)]
    return [(task.name, task.student) for task in report.tasks if task.student is not None]


def accuracy_rows(report: Report) -> list[Row]:
    """Every accuracy that was measured, in the order of the student's life."""
    a = report.accuracy
    rows = [
        ("From scratch", "the same network on the probe set's labels alone", a.scratch, "scratch"),
        ("FedSA, FP32", "as trained", a.fedsa_fp32, "fedsa"),
        ("FedSA, INT8", "quantised, on the workstation", a.fedsa_int8, "fedsa"),
        *(
            (f"INT8 on {device}", "", fraction, "device")
            for device, fraction in sorted((a.deployed or {}).items())
        ),
    ]
    return [Row(name, note, found, kind) for name, note, found, kind in rows if found is not None]


def lost_lines(report: Report) -> list[str]:
    """For each teacher that was set aside: when, why, and what it cost."""
    lines = []
    for one in report.lost:
        cost = [f"{duration(one.waited_s)} of waiting"] if one.waited_s >= 1 else []
        if one.reselected:
            cost.append("a new selection, for it had been selected")
        line = f"{one.teacher}, at {one.stage}: {one.why.rstrip('.')}."
        if cost:
            line += f" It cost {' and '.join(cost)}."
        if one.back:
            line += f" It answered again at {one.back}."
        lines.append(line)
    return lines


def score_bars(teachers: Sequence[TeacherResult]) -> dict[str, float]:
    """Teacher id to the share of its bar that is filled: from a little for the least score to all.

    Scores lie close together, so a bar from zero would show nothing; the numbers stand beside it.
    """
    scores = [t.score for t in teachers]
    spread = max(scores, default=0.0) - min(scores, default=0.0)
    return {
        t.id: 0.12 + 0.88 * (t.score - min(scores)) / spread if spread > 0 else 1.0
        for t in teachers
    }


def selections(report: Report) -> list[Selected]:
    """One for each task, or the only one."""
    if len(report.tasks) < 2:
        return [Selected("", report.teachers, score_bars(report.teachers))]
    return [Selected(task.name, task.teachers, score_bars(task.teachers)) for task in report.tasks]


def deployed_range(task: TaskResult) -> str:
    """What the devices' answers reach, from the least to the greatest."""
    found = task.accuracy.deployed
    if not found:
        return "\u2013"
    low, high = percent(min(found.values())), percent(max(found.values()))
    return low if low == high else f"{low} to {high}"


def methods(report: Report) -> list[str]:
    """Every method that any device was asked by, the busiest first."""
    sums: dict[str, int] = {}
    for by_method in report.bytes_on_wire.values():
        for method, traffic in by_method.items():
            sums[method] = sums.get(method, 0) + traffic.sent + traffic.received
    return sorted(sums, key=lambda method: (-sums[method], method))


def total(by_method: dict[str, Traffic]) -> Traffic:
    """The sum over methods."""
    return Traffic(
        sent=sum(t.sent for t in by_method.values()),
        received=sum(t.received for t in by_method.values()),
    )


def settings(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested configuration as (dotted key, value), in its own order."""
    found: list[tuple[str, Any]] = []
    for key, content in config.items():
        if isinstance(content, dict):
            found += settings(content, f"{prefix}{key}.")
        else:
            found.append((prefix + key, content))
    return found


def _charts(report: Report) -> dict[str, Chart]:
    """The learning curves for a screen and for a phone; empty where nothing was measured."""
    sizes = {"wide": (920.0, 340.0), "narrow": (360.0, 300.0)}
    laid_out = {
        name: learning_curves(report.curves, "fedsa", *extent) for name, extent in sizes.items()
    }
    return {name: chart for name, chart in laid_out.items() if chart is not None}


def _photographs(report: Report, pictures: Pictures | None) -> list[Photograph]:
    if pictures is None:
        return []

    def cell(who: str, i: int) -> Cell | None:
        if who not in pictures.teachers:
            return None
        saliency = pictures.teachers[who][i]
        similarity = pictures.similarities.get(who)
        return Cell(
            heat_uri(saliency),
            describe(saliency),
            None if similarity is None else float(similarity[i]),
        )

    return [
        Photograph(
            uri=photograph_uri(image),
            label=pictures.labels[i] if pictures.labels else f"image {i + 1}",
            student=Cell(heat_uri(pictures.student[i]), describe(pictures.student[i]), None),
            teachers=tuple(cell(t.id, i) for t in report.teachers),
        )
        for i, image in enumerate(pictures.images)
    ]


def percent(fraction: float) -> str:
    """0.5512 -> "55.1 %"."""
    return f"{100 * fraction:.1f}{_THIN}%"


def points(difference: float) -> str:
    """0.098 -> "+9.8 points"."""
    amount = f"{abs(100 * difference):.1f}"
    sign = "" if amount == "0.0" else "+" if difference > 0 else _MINUS
    return f"{sign}{amount}{_THIN}points"


def size(number: int) -> str:
    """1_400_000 -> "1.4 MB"; decimal units."""
    amount, unit = float(number), "B"
    for larger in ("kB", "MB", "GB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    shown = f"{amount:.0f}" if unit == "B" or amount >= 99.95 else f"{amount:.1f}"
    return f"{shown}{_THIN}{unit}"


def duration(seconds: float) -> str:
    """83.4 -> "1 min 23 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f}{_THIN}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{_THIN}s"
    return f"{whole // 60}{_THIN}min {whole % 60}{_THIN}s"


def count(number: int) -> str:
    """12345 -> "12 345" with thin spaces."""
    return f"{number:,}".replace(",", _THIN)


def moment(iso: str) -> str:
    """An ISO 8601 time as "2026-11-22 11:30 UTC"; what is not one stays as it is."""
    try:
        then = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return then.strftime("%Y-%m-%d %H:%M %Z").strip()


def value(setting: Any) -> str:
    """A configuration value as a person writes it."""
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    if isinstance(setting, float) and math.isfinite(setting):
        return f"{setting:g}"
    if isinstance(setting, (list, tuple)):
        return ", ".join(value(item) for item in setting)
    return "\u2014" if setting is None or setting == "" else str(setting)
