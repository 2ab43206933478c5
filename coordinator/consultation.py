"""What the teachers of a run are asked, and whom it selects by their answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from numpy.typing import NDArray

from coordinator.amalgamation.answers import TeacherAnswers, ask, ask_pooled
from coordinator.answers.checks import check_saliency
from coordinator.checkpoints import RoundSelection, Run
from coordinator.config import Config
from coordinator.data import TaskData, spread
from coordinator.progress import Progress
from coordinator.ranks import ALONE, Ranks
from coordinator.roster import Roster
from coordinator.selection import Evidence, select, strategy_named
from coordinator.selection.probe import judge_of
from coordinator.student import Student, grad_cam
from coordinator.tracking import UNTRACKED, Tracking
from edge_teacher.contract.errors import CheckFailed

SELECTION_IMAGES = 500
"""More labelled images than this make a selection slower and no better."""


class Consultation:
    """Asks a roster of teachers about one task's images; keeps what they answered.

    `images` are those of the probe set that selections are made by; `teacher_maps` has where everyone
    looks on them, [P, S, S]; `answers` what those selected say of the images the student trains on.
    """

    def __init__(
        self,
        config: Config,
        data: TaskData,
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
        self.images = spread(data.probe, SELECTION_IMAGES)
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

    def ask(self, number: int, student: Student) -> Mapping[str, float]:
        """The weights of those selected last, whose answers are in `answers` now.

        Selects again without those who fail, until all have answered.
        """
        aggregation, data = self._config.aggregation, self._data
        while True:
            weights = self._run.record.selections[-1].selection.weights
            missing = {name for name in weights if name not in self.answers}
            asked = missing & set(self._roster.present)
            self._progress.begin("ask", len(asked))
            with self._timed("ask"), self._unless_too_few_are_left(number):
                found = self._roster.ask(
                    asked,
                    lambda teacher: ask(
                        teacher,
                        data.probe.images,
                        data.transfer,
                        flips=aggregation.flips,
                        maps=aggregation.hint_maps > 0,
                    ),
                    f"features before round {number + 1}",
                    self._progress.advance,
                )
            self.answers.update(found)
            self._progress.end()
            gone = [name for name in weights if name not in self.answers]
            if not gone:
                return weights
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
        probe = self.images.images
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
        if self._config.selection.strategy != "oracle" or self._data.test is None:
            return None
        return self._data.test.images

    def _select(self, number: int, student: Student) -> None:
        config, probe, record = self._config.selection, self.images, self._run.record
        there = {name: self.teacher_maps[name] for name in self._roster.present}
        k = config.k
        if config.strategy != "all" and k > len(there):
            k = len(there)
            self._progress.say(f"selection.k is {config.k}, and {k} can be asked: k is {k}")
        # Not the one that is made again: who is gone cannot stay.
        earlier = [made.selection.weights for made in record.selections if made.round < number]
        before = [name for name in earlier[-1] if name in there] if earlier else []
        with self._timed("select"):
            evidence = Evidence(
                grad_cam(student, probe.images),
                there,
                targets=np.eye(len(probe.classes), dtype=np.float32)[probe.labels],
                features={name: found for name, found in self._features.items() if name in there},
                judge=judge_of(self._features, probe, self._test, self._data.test),
            )
            rng = np.random.default_rng([self._config.seed, number])
            # One decides for all: machines that round differently could choose different teachers.
            selection = self._ranks.first_does(
                lambda: select(config.strategy, evidence, k, rng, tuple(before))
            )
        # One made before somebody selected was lost was never used.
        record.selections = [s for s in record.selections if s.round != number]
        record.selections.append(RoundSelection(number, selection))
        chosen = {f"selection/{name}": selection.weights.get(name, 0.0) for name in there}
        self._tracking.write(record.steps, chosen)
        shares = ", ".join(f"{name} ({weight:.2f})" for name, weight in selection.weights.items())
        self._progress.say(f"Selected before round {number + 1}: {shares}")

    def _timed(self, what: str) -> AbstractContextManager[None]:
        return self._run.timed(what)
