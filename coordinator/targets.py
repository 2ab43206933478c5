"""What a run's student learns from those selected, and when the task heads are fitted again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from coordinator.amalgamation.agreement import agreements
from coordinator.amalgamation.task import AmalgamationTask
from coordinator.checkpoints import AGREEMENT, Run
from coordinator.config import AggregationConfig
from coordinator.consultation import Consultation
from coordinator.stage import Stage
from coordinator.student import Student

# No score is told of it: the student has learnt the labels that any fold of them would be held out of.
_REFITTED = "The task head was fitted again, on the student's own features too"


def amalgamation_task(
    stage: Stage, student: Student, consultation: Consultation, number: int
) -> AmalgamationTask:
    """The task for the teachers selected last."""
    data = stage.data
    selected = consultation.ask(number, student)
    agreement = _agreement(stage, student, consultation, selected)
    with stage.run.timed("head"):
        task = AmalgamationTask(
            student,
            data,
            consultation.answers,
            selected,
            stage.run.nets,
            stage.config.aggregation,
            stage.config.head,
            stage.config.seed,
            agreement,
        )
    _go_on_refitted(stage, task, number)
    return task


def _agreement(
    stage: Stage,
    student: Student,
    consultation: Consultation,
    selected: Mapping[str, Mapping[str, float]],
) -> dict[str, Tensor]:
    """What the hints of those selected count by image, by the student as it was when they were."""
    if not stage.config.aggregation.agreement:
        return {}
    run = stage.run
    place = run.record.selections[-1].round + 1
    names = sorted({name for weights in selected.values() for name in weights})
    keys = {}
    for name in names:
        # Agreement is with where the student looks for these: of other tasks it is another.
        tasks = ", ".join(task for task, weights in selected.items() if name in weights)
        keys[name] = f"{AGREEMENT}{name} for {tasks} before round {place}"
    missing = [name for name in names if keys[name] not in run.nets]
    if missing:
        with run.timed("agreement"):
            # One for all: machines that round differently would see other maps.
            found = stage.ranks.first_does(
                lambda: agreements(student, stage.data, consultation.answers, selected, missing)
            )
        known = {keys[n]: run.nets[keys[n]] for n in names if n not in found}
        run.keep_agreement(known | {keys[name]: {"each": found[name]} for name in missing})
    return {name: run.nets[key]["each"] for name, key in keys.items()}


def _go_on_refitted(stage: Stage, task: AmalgamationTask, number: int) -> None:
    """Once the heads were fitted again, those for other teachers are too, with the student of now.

    Unless all of them are right afterwards.
    """
    run = stage.run
    due = number in refits_before(stage.config.aggregation) and not run.has(refit_name(number))
    if not due and any(map(run.has, map(refit_name, range(number + 1)))) and task.unsaved:
        with run.timed("head"):
            task.refit(task.unsaved)
        _keep_refitted(run, task, task.unsaved)
        # By the student as it is before the round: a run that is killed within it has another.
        run.save()
    known = run.record.refitted
    if known and all(key in known for key in task.targets.values()):
        stage.progress.say(_REFITTED)
    else:
        _say_scores(stage, task)


def _keep_refitted(run: Run, task: AmalgamationTask, names: Iterable[str]) -> None:
    nets = task.nets()
    keys = {task.targets[name]: name for name in names}
    run.keep_refitted(
        {key: task.taught[name].score for key, name in keys.items()},
        {key: nets[key].state_dict() for key in keys},
    )


def refit_name(number: int) -> str:
    return f"refit before round {number + 1}"


def refits_before(config: AggregationConfig) -> set[int]:
    """The rounds, counted from 0, before which the task heads are fitted again; evenly spread."""
    every = config.refits + 1
    return {config.rounds * part // every for part in range(1, every)} - {0}


def refit(stage: Stage, task: AmalgamationTask) -> None:
    if stage.resumed():
        return
    with stage.run.timed("head"):
        task.refit()
    stage.progress.say(_REFITTED)
    stage.run.forget_targets(task.targets.values())
    _keep_refitted(stage.run, task, task.targets)
    stage.finish(**task.nets())


def _say_scores(stage: Stage, task: AmalgamationTask) -> None:
    for name, taught in task.taught.items():
        metric = stage.data.tasks[name].kind.metrics[0].replace("_", " ")
        of_task = f" for {name}" if len(stage.data.tasks) > 1 else ""
        stage.progress.say(
            f"A linear head on their features{of_task} reaches {taught.score:.1%} {metric} on the probe "
            "images, in cross-validation"
        )
