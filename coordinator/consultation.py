"""What the teachers of a run are asked, and whom it selects by their answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from coordinator.amalgamation.answers import (
    TeacherAnswers,
    ask,
    ask_attended,
    ask_looks,
    ask_pooled,
)
from coordinator.answers.checks import check_saliency
from coordinator.checkpoints import RoundSelection, Run
from coordinator.config import Config
from coordinator.data import LabelledTask, SeveralTasks, spread
from coordinator.progress import Progress
from coordinator.ranks import ALONE, Ranks
from coordinator.roster import Roster
from coordinator.selection import Evidence, Selection, select, strategy_named
from coordinator.selection.probe import judge_of
from coordinator.student import Student, grad_cam
from coordinator.teachers import Teacher
from coordinator.tracking import UNTRACKED, Tracking
from edge_teacher.contract.errors import CheckFailed

SELECTION_IMAGES = 500
"""More labelled images than this make a selection slower and no better."""


class Consultation:
    """Asks a roster of teachers about the tasks' images; keeps what they answered.

    `looked` has the probe images that selections are made by; `teacher_maps` where everyone looks on
    them, [P, S, S], one task's after the other's; `answers` what those selected say of the images the
    student trains on.
    """

    def __init__(
        self,
        config: Config,
        data: SeveralTasks,
        run: Run,
        roster: Roster,
        progress: Progress,
        ranks: Ranks = ALONE,
        tracking: Tracking = UNTRACKED,
    ) -> None:
        self._config = config
        self._data = data
        self._run = run
        self._roster = roster
        self._progress = progress
        self._ranks = ranks
        self._tracking = tracking
        self._strategy = strategy_named(config.selection.strategy)
        self.looked = SeveralTasks(
            {
                name: LabelledTask(spread(task.probe, SELECTION_IMAGES), task.test, task.weight)
                for name, task in data.tasks.items()
            },
            data.transfer,
        )
        self.teacher_maps: dict[str, NDArray[np.float32]] = {}
        self._features: dict[str, NDArray[np.float32]] = {}
        self._test: dict[str, dict[str, NDArray[np.float32]]] = {name: {} for name in data.tasks}
        self.answers: dict[str, TeacherAnswers] = {}

    def open(self) -> None:
        """Ask everyone what a selection needs; once, for teachers do not change.

        Who was set aside by an earlier session has another chance.
        """
        self._look({*self._roster.present, *self._roster.returned()}, "saliency")

    def select(self, number: int, student: Student) -> None:
        """Select for round `number`, among those who can be asked, as the student is now."""
        back = set(self._roster.returned())
        # The first selection comes right after everyone was asked.
        if number and back:
            self._look(back, f"saliency before round {number + 1}")
        self._select(number, student)

    def student_maps(self, student: Student) -> NDArray[np.float32]:
        """Where the student looks on each task's images with that task's head, [P, s, s]."""
        return np.concatenate(
            [grad_cam(student, task.probe.images, n) for n, task in self.looked.tasks.items()]
        )

    def ask(self, number: int, student: Student) -> Mapping[str, Mapping[str, float]]:
        """By task: the weights of those selected last, whose answers are in `answers` now.

        Selects again without those who fail, until all have answered.
        """
        aggregation, data = self._config.aggregation, self._data
        # Without soft targets nothing is fitted to the maps.
        by_maps = aggregation.soft_targets > 0 and any(
            task.kind.wants_maps for task in data.tasks.values()
        )

        def question(teacher: Teacher) -> TeacherAnswers:
            found = ask(
                teacher,
                data.probe_images,
                data.transfer,
                flips=aggregation.flips,
                maps=aggregation.hint_maps > 0 or by_maps,
                probe_maps=by_maps,
            )
            if aggregation.agreement:
                looks = ask_looks(teacher, data.probe_images, data.transfer)
                found = replace(found, looks=looks)
            return found

        while True:
            selected = {s.task: s.selection.weights for s in self._run.record.selections}
            wanted = dict.fromkeys(name for weights in selected.values() for name in weights)
            missing = {name for name in wanted if name not in self.answers}
            asked = missing & set(self._roster.present)
            self._progress.begin("ask", len(asked))
            with self._timed("ask"), self._unless_too_few_are_left(number):
                found = self._roster.ask(
                    asked,
                    question,
                    f"features before {self._called(number)}",
                    self._progress.advance,
                )
            self.answers.update(found)
            self._progress.end()
            gone = [name for name in wanted if name not in self.answers]
            if not gone:
                return selected
            self._roster.replaced(gone)
            self._begin_again(number)
            self._select(number, student)

    @contextmanager
    def _unless_too_few_are_left(self, number: int) -> Iterator[None]:
        """When the run ends for that, a selection that nothing was learnt from is made again later."""
        try:
            yield
        except CheckFailed:
            record = self._run.record
            if not self._run.began(self._stage(number)):
                record.selections = [s for s in record.selections if s.round != number]
                self._run.save()
            raise

    def _begin_again(self, number: int) -> None:
        """What an earlier process had in hand of this stage was about other teachers."""
        stage = self._stage(number)
        self._run.forget(f"refit before {stage}")
        if not self._run.began(stage):
            return
        self._run.begin_again(stage)
        self._progress.say(
            f"{stage} begins again, from the student as it was left, for somebody it learnt from is gone"
        )

    def _stage(self, number: int) -> str:
        return f"round {number + 1}" if self._is_round(number) else "fine-tune"

    def _called(self, number: int) -> str:
        """As people call the stage."""
        return self._stage(number) if self._is_round(number) else "fine-tuning"

    def _is_round(self, number: int) -> bool:
        """After the last there is the fine-tuning."""
        return number < self._config.aggregation.rounds

    def _look(self, names: set[str], words: str) -> None:
        probe = self.looked.probe_images
        self._progress.begin("saliency", len(names))
        with self._timed("saliency"):
            found = self._roster.ask(
                names,
                lambda teacher: check_saliency(teacher.name, teacher.saliency(probe), len(probe)),
                words,
                self._progress.advance,
            )
        self.teacher_maps.update(found)
        self._progress.end()
        if self._strategy.reads_features:
            self._features.update(self._see(found, probe, words.replace("saliency", "features")))
        if self._config.selection.strategy != "oracle":
            return
        for name, task in self._data.tasks.items():
            if task.test is not None:
                seen = self._see(found, task.test.images, "features of the test set")
                self._test[name].update(seen)

    def _see(
        self, names: Iterable[str], images: NDArray[np.uint8], words: str
    ) -> dict[str, NDArray[np.float32]]:
        """The pooled features of those who answer, [N, D], pooled as the strategy reads them."""
        asked = list(names)
        flips = self._config.aggregation.flips

        def question(teacher: Teacher) -> NDArray[np.float32]:
            if self._strategy.under_saliency:
                return ask_attended(teacher, images, self.teacher_maps[teacher.name])
            return ask_pooled(teacher, images, flips=flips)

        self._progress.begin("features", len(asked))
        with self._timed("saliency"):
            seen = self._roster.ask(
                asked,
                question,
                words,
                self._progress.advance,
            )
        self._progress.end()
        return seen

    def _select(self, number: int, student: Student) -> None:
        """For every task, by its own probe images and where the student looks with its head."""
        config, record = self._config.selection, self._run.record
        k, there = config.k, len(self._roster.present)
        if config.strategy != "all" and k > there:
            k = there
            self._progress.say(f"selection.k is {config.k}, and {k} can be asked: k is {k}")
        with self._timed("select"):
            # One decides for all: machines that round differently could choose different teachers.
            made = self._ranks.first_does(
                lambda: [
                    RoundSelection(
                        number,
                        self._selected(number, student, name, i, k),
                        name,
                        "" if self._is_round(number) else self._stage(number),
                    )
                    for i, name in enumerate(self.looked.tasks)
                ]
            )
        # One made before somebody selected was lost was never used.
        record.selections = [s for s in record.selections if s.round != number] + made
        several = len(made) > 1
        for one in made:
            weights = one.selection.weights
            place = f"selection/{one.task}/" if several else "selection/"
            self._tracking.write(
                record.steps,
                {place + name: weights.get(name, 0.0) for name in self._roster.present},
            )
            shares = ", ".join(f"{name} ({weight:.2f})" for name, weight in weights.items())
            of_task = f" for {one.task}" if several else ""
            self._progress.say(f"Selected{of_task} before {self._called(number)}: {shares}")

    def _selected(self, number: int, student: Student, name: str, place: int, k: int) -> Selection:
        """The `place`-th task's selection, among those who can be asked."""
        task, rows = self.looked.tasks[name], self.looked.rows(name)
        maps, features = (
            {teacher: all_[teacher][rows] for teacher in self._roster.present if teacher in all_}
            for all_ in (self.teacher_maps, self._features)
        )
        # Not the one that is made again: who is gone cannot stay.
        earlier = [
            s.selection.weights
            for s in self._run.record.selections
            if s.round < number and s.task == name
        ]
        before = tuple(teacher for teacher in earlier[-1] if teacher in maps) if earlier else ()
        evidence = Evidence(
            grad_cam(student, task.probe.images, name),
            maps,
            targets=task.kind.targets(task.probe.labels, len(task.classes)),
            features=features,
            judge=judge_of(features, task.probe, self._test[name], task.test),
            current=before,
            sticky=self._config.selection.sticky,
        )
        # The first task's draws are those it has alone.
        seed = [self._config.seed, number, place] if place else [self._config.seed, number]
        rng = np.random.default_rng(seed)
        return select(self._config.selection.strategy, evidence, k, rng)

    def _timed(self, what: str) -> AbstractContextManager[None]:
        return self._run.timed(what)
