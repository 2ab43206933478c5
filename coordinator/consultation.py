"""What the teachers of a run are asked, and whom it selects by their answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from numpy.typing import NDArray

from coordinator.amalgamation.answers import TeacherAnswers, ask, ask_pooled
from coordinator.answers.checks import check_saliency
from coordinator.checkpoints import RoundSelection, Run
from coordinator.config import Config
from coordinator.data import LabelledImages, SeveralTasks, rows_of, spread
from coordinator.progress import Progress
from coordinator.roster import Roster
from coordinator.selection import Evidence, select, strategy_named
from coordinator.selection.probe import judge_of
from coordinator.student import Student, grad_cam
from edge_teacher.contract.errors import CheckFailed, UsageError

SELECTION_IMAGES = 500
"""More labelled images than this make a selection slower and no better."""


class Consultation:
    """Asks a roster of teachers about the tasks' images; keeps what they answered.

    `images` are, by task, those of its probe set that selections are made by; `teacher_maps` has where
    everyone looks on them, one task's after the other's, [P, S, S]; `answers` what those selected say of
    the images the student trains on.
    """

    def __init__(
        self, config: Config, data: SeveralTasks, run: Run, roster: Roster, progress: Progress
    ) -> None:
        self._config = config
        self._data = data
        self._run = run
        self._roster = roster
        self._progress = progress
        self._strategy = strategy_named(config.selection.strategy)
        self.images = {
            name: spread(task.probe, SELECTION_IMAGES) for name, task in data.tasks.items()
        }
        _require_oracle_can_judge(config, data)
        self.teacher_maps: dict[str, NDArray[np.float32]] = {}
        self._features: dict[str, NDArray[np.float32]] = {}
        self._test: dict[str, NDArray[np.float32]] = {}
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

    def rows(self, name: str) -> slice:
        """Where a task's images are among those of all tasks that were looked at."""
        return rows_of({task: len(images) for task, images in self.images.items()}, name)

    def ask(self, number: int, student: Student) -> dict[str, Mapping[str, float]]:
        """By task the weights of those selected last, whose answers are in `answers` now.

        Selects again without those who fail, until all have answered.
        """
        aggregation, data = self._config.aggregation, self._data
        # Without soft targets nothing is fitted to the maps.
        by_maps = aggregation.soft_targets > 0 and any(
            task.kind.wants_maps for task in data.tasks.values()
        )
        while True:
            selected = {s.task: s.selection.weights for s in self._run.record.selections}
            wanted = dict.fromkeys(name for weights in selected.values() for name in weights)
            missing = {name for name in wanted if name not in self.answers}
            asked = missing & set(self._roster.present)
            self._progress.begin("ask", len(asked))
            with self._timed("ask"), self._unless_too_few_are_left(number):
                found = self._roster.ask(
                    asked,
                    lambda teacher: ask(
                        teacher,
                        data.probe_images,
                        data.transfer,
                        flips=aggregation.flips,
                        maps=aggregation.hint_maps > 0 or by_maps,
                        probe_maps=by_maps,
                    ),
                    f"features before round {number + 1}",
                    self._progress.advance,
                )
            self.answers.update(found)
            self._progress.end()
            gone = [name for name in wanted if name not in self.answers]
            if not gone:
                return dict(selected)
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
            if self._run.midway is None:
                record.selections = [s for s in record.selections if s.round != number]
                self._run.save()
            raise

    def _begin_again(self, number: int) -> None:
        """What an earlier process had in hand of this stage was about other teachers."""
        if self._run.midway is None:
            return
        stage = self._run.midway.stage.split(", ")[0]
        self._run.begin_again(stage)
        self._progress.say(
            f"{stage} begins again, from the student as it was left, for somebody it learnt from is gone"
        )

    def _look(self, names: set[str], words: str) -> None:
        probe = _joined([images.images for images in self.images.values()])
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
        test = self._test_images()
        if test is not None:
            self._test.update(self._see(found, test, "features of the test set"))

    def _see(
        self, names: Iterable[str], images: NDArray[np.uint8], words: str
    ) -> dict[str, NDArray[np.float32]]:
        """The pooled features of those who answer, [N, D]."""
        asked = list(names)
        flips = self._config.aggregation.flips
        self._progress.begin("features", len(asked))
        with self._timed("saliency"):
            seen = self._roster.ask(
                asked,
                lambda teacher: ask_pooled(teacher, images, flips=flips),
                words,
                self._progress.advance,
            )
        self._progress.end()
        return seen

    def _test_images(self) -> NDArray[np.uint8] | None:
        """What only the oracle has the teachers asked about."""
        tests = [task.test for task in self._data.tasks.values()]
        there = [test.images for test in tests if test is not None]
        if self._config.selection.strategy != "oracle" or not there:
            return None
        return _joined(there)

    def _test_rows(self, name: str) -> tuple[LabelledImages, slice] | None:
        """A task's test set, and where its images are among those of all test sets."""
        sizes = {n: 0 if t.test is None else len(t.test) for n, t in self._data.tasks.items()}
        test = self._data.tasks[name].test
        return None if test is None else (test, rows_of(sizes, name))

    def _select(self, number: int, student: Student) -> None:
        """For every task, by where the student looks with that task's head, and by its labels."""
        config, record = self._config.selection, self._run.record
        # The one that is made again is not among them: who is gone cannot stay.
        earlier = [made for made in record.selections if made.round < number]
        k = config.k
        if config.strategy != "all" and k > len(self._roster.present):
            k = len(self._roster.present)
            self._progress.say(f"selection.k is {config.k}, and {k} can be asked: k is {k}")
        made = []
        for i, name in enumerate(self._data.tasks):
            before = [m.selection.weights for m in earlier if m.task == name]
            # The first task's draws are those that it has alone.
            dice = [self._config.seed, number, i] if i else [self._config.seed, number]
            with self._timed("select"):
                evidence = self._evidence(name, student)
                current = [t for t in before[-1] if t in evidence.teacher_maps] if before else []
                rng = np.random.default_rng(dice)
                selection = select(config.strategy, evidence, k, rng, tuple(current))
            made.append(RoundSelection(number, selection, name))
            shares = ", ".join(f"{n} ({weight:.2f})" for n, weight in selection.weights.items())
            of_task = f" for {name}" if len(self._data.tasks) > 1 else ""
            self._progress.say(f"Selected{of_task} before round {number + 1}: {shares}")
        # One made before somebody selected was lost was never used.
        record.selections = [s for s in record.selections if s.round != number] + made

    def _evidence(self, name: str, student: Student) -> Evidence:
        task, probe, rows = self._data.tasks[name], self.images[name], self.rows(name)
        there = self._roster.present
        seen = {n: found[rows] for n, found in self._features.items()}
        test = self._test_rows(name)
        judge = None
        if test is not None:
            tested = {n: found[test[1]] for n, found in self._test.items()}
            judge = judge_of(seen, probe, tested, test[0])
        return Evidence(
            grad_cam(student, probe.images, name),
            {n: self.teacher_maps[n][rows] for n in there},
            targets=task.kind.targets(probe.labels, len(task.classes)),
            features={n: found for n, found in seen.items() if n in there},
            judge=judge,
        )

    def _timed(self, what: str) -> AbstractContextManager[None]:
        return self._run.timed(what)


def _joined(sets: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return sets[0] if len(sets) == 1 else np.concatenate(sets)


def _require_oracle_can_judge(config: Config, data: SeveralTasks) -> None:
    if config.selection.strategy != "oracle":
        return
    for name, task in data.tasks.items():
        if task.probe.kind != "single-label":
            raise UsageError(
                f"The oracle judges by accuracy, and the task {name} is {task.probe.kind}; choose another "
                "selection.strategy."
            )
