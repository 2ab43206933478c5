"""From what training, packaging and the devices gave to what the report says of each task and of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coordinator.amalgamation.task import joint_weights
from coordinator.packaging import PackagedStudent
from coordinator.report import (
    Accuracy,
    CurvePoint,
    Round,
    TaskResult,
    TeacherResult,
    metric_name,
)
from coordinator.selection import Selection
from coordinator.training import TrainingResult
from edge_teacher.contract.messages import Card

Deployed = Mapping[str, dict[str, float]]
"""By task: what each device's answers reach, in the kind's first metric; only tasks that have a test set."""


def task_result(
    name: str,
    called: str,
    result: TrainingResult,
    packaged: PackagedStudent,
    deployed: Deployed | None,
) -> TaskResult:
    task = result.data.tasks[name]
    metric = task.kind.metrics[0]
    metrics = {net: dict(found[name]) for net, found in result.metrics.items() if name in found}
    int8 = packaged.report.files[packaged.card.graphs["int8_cpu"]]
    return TaskResult(
        name=called,
        kind=task.probe.kind,
        classes=task.classes,
        probe=len(task.probe),
        test=None if task.test is None else len(task.test),
        weight=task.weight,
        metric=metric,
        metrics=metrics,
        accuracy=Accuracy(
            scratch=metrics.get("scratch", {}).get(metric),
            fedsa_fp32=metrics.get("fedsa", {}).get(metric),
            fedsa_int8=int8.accuracy,
            deployed=None if deployed is None else deployed.get(name),
        ),
        teachers=_teachers(result.last_selections()[name], result.about),
        student=packaged.report,
        version=packaged.card.version,
    )


def joint_accuracy(tasks: Sequence[TaskResult]) -> Accuracy:
    """The means over the tasks that have a test set."""

    def mean(values: Sequence[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return float(np.mean(there)) if there else None

    if len(tasks) == 1:
        return tasks[0].accuracy
    asked = [task.accuracy.deployed for task in tasks if task.accuracy.deployed]
    return Accuracy(
        scratch=mean([task.accuracy.scratch for task in tasks]),
        fedsa_fp32=mean([task.accuracy.fedsa_fp32 for task in tasks]),
        fedsa_int8=mean([task.accuracy.fedsa_int8 for task in tasks]),
        deployed={d: float(np.mean([a[d] for a in asked])) for d in asked[0]} if asked else None,
    )


def joint_metric(tasks: Sequence[TaskResult]) -> str:
    if len(tasks) == 1:
        return tasks[0].metric
    named = dict.fromkeys(metric_name(task.metric) for task in tasks)
    return f"mean over {len(tasks)} tasks of {' or '.join(named)}"


def rounds(result: TrainingResult) -> tuple[Round, ...]:
    """By round, the teachers' shares in the hints: those of all tasks together."""
    selected: dict[tuple[int, str], dict[str, Mapping[str, float]]] = {}
    for found in result.selections:
        place = (found.round, found.stage)
        selected.setdefault(place, {})[found.task] = found.selection.weights
    return tuple(
        Round(number=number + 1, weights=joint_weights(result.data, weights), stage=stage)
        for (number, stage), weights in selected.items()
    )


def together(tasks: Sequence[TaskResult]) -> tuple[TeacherResult, ...]:
    """Every teacher over all tasks: the weight its share in the hints, the scores the plain means."""
    if len(tasks) == 1:
        return tasks[0].teachers
    whole = sum(task.weight for task in tasks)
    found = []
    for name in (teacher.id for teacher in tasks[0].teachers):
        each = {task.name: next(t for t in task.teachers if t.id == name) for task in tasks}
        takers = [task for task, teacher in each.items() if teacher.selected]
        first = next(iter(each.values()))
        found.append(
            TeacherResult(
                id=name,
                score=float(np.mean([t.score for t in each.values()])),
                similarity=float(np.mean([t.similarity for t in each.values()])),
                probability=float(np.mean([t.probability for t in each.values()])),
                selected=bool(takers),
                weight=sum(task.weight * each[task.name].weight for task in tasks) / whole,
                reason=f"selected for {', '.join(takers)}" if takers else "selected for no task",
                about=first.about,
            )
        )
    return tuple(sorted(found, key=lambda teacher: -teacher.score))


def about(card: Card) -> str:
    """What a teacher is, in words."""
    teacher = card.teacher
    height, width = teacher.input_size
    channels = teacher.taps[teacher.saliency_tap].channels
    return f"{teacher.name}, input {height} × {width}, {channels} features"


def _teachers(selection: Selection, about: Mapping[str, str]) -> tuple[TeacherResult, ...]:
    return tuple(
        TeacherResult(
            id=score.teacher,
            score=score.score,
            similarity=score.similarity,
            probability=score.probability,
            selected=score.selected,
            weight=score.weight,
            reason=score.reason,
            about=about.get(score.teacher, ""),
        )
        for score in selection.teachers
    )


def curves(result: TrainingResult) -> dict[str, tuple[CurvePoint, ...]]:
    """Per network, with the images seen since its first step: stages count from their own."""
    curves: dict[str, list[CurvePoint]] = {}
    seen: dict[str, int] = {}
    last: dict[str, tuple[str, int]] = {}
    for point in result.curve:
        network = "scratch" if point.stage == "scratch" else "fedsa"
        stage, images = last.get(network, (point.stage, 0))
        if stage != point.stage:
            seen[network] = seen.get(network, 0) + images
        last[network] = (point.stage, point.images)
        curves.setdefault(network, []).append(
            CurvePoint(
                stage=point.stage,
                images_seen=seen.get(network, 0) + point.images,
                loss=point.loss,
                accuracy=point.accuracy,
            )
        )
    return {network: tuple(points) for network, points in curves.items()}
