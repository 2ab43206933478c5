"""The one loop that every stage of training runs: epochs, batches, steps, progress, checkpoints.

A stage says what it trains, on what and by which loss, as a `Lesson`; the loop does the rest, and
no stage has one of its own. It writes where it is every so many seconds, to the step and with the
state of every random choice, so that a process that is killed and started again computes what it
would have computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coordinator.amalgamation.task import Losses
from coordinator.augmentation import Jitter
from coordinator.checkpoints import Midway, Run
from coordinator.optimisation import Descent, OneCycle, derived_seed, joint_batches, joint_steps
from coordinator.progress import Progress
from coordinator.ranks import ALONE, Ranks, speaking
from coordinator.tracking import UNTRACKED, Meter, Tracking, numbers
from edge_teacher.contract.errors import CheckFailed

_ASK_EVERY_STEPS = 16
"""How often several processes ask the first whether it is time to write."""


@dataclass(frozen=True)
class Drawn:
    """Images of one step, by index int64[N], and how each of them is changed."""

    index: Tensor
    jitter: Jitter

    @classmethod
    def of(cls, index: Tensor, shift: int, random: torch.Generator) -> Drawn:
        """Each flipped or not, and shifted by up to `shift` pixels."""
        return cls(index, Jitter.draw(len(index), shift, random))

    def rows(self, rows: Tensor) -> Drawn:
        """Some of them, by their places in the batch int64[M]."""
        return Drawn(self.index[rows], self.jitter.rows(rows))


Draw = Callable[[tuple[Tensor, ...], torch.Generator], tuple[Drawn, ...]]
"""The indices int64[N] of a batch of each set -> all that is random about them.

Only here may a step take random numbers: what is drawn is then the same however it is computed.
"""

StepLoss = Callable[..., tuple[Tensor, Losses]]
"""What was drawn, one argument for each, -> the loss to descend and its parts."""

Measure = Callable[[int], None]
"""The number of finished epochs -> a point on the learning curve."""


@dataclass(frozen=True)
class Lesson:
    """What one pass through the loop trains.

    Attributes:
        name: unique in the run; what was finished under it is not done again.
        nets: the nets whose states are this lesson's result, by the names they are saved under.
        trained: the modules that descend; all are in `nets`.
        images: how many each set has; a step draws a batch of each (`joint_batches`).
        cycle, first_step: the learning rate, and where in its cycle the lesson begins.
        prepare: called once, before the first step, and not again by a run that goes on.
        measure: called after every `measure_every` epochs and after the last.
        stepped: called after every step with its number, from 1.
        ended: called after every epoch, before `measure`, with how many are done; whether that was the
            last. What these two remember is in `nets`.
    """

    name: str
    nets: Mapping[str, nn.Module]
    trained: Sequence[nn.Module]
    images: Sequence[int]
    epochs: int
    cycle: OneCycle
    draw: Draw
    loss: StepLoss
    first_step: int = 0
    prepare: Callable[[], None] | None = None
    measure: Measure | None = None
    measure_every: int = 5
    stepped: Callable[[int], None] | None = None
    ended: Callable[[int], bool] | None = None


class Loop:
    """Runs lessons in a `Run`, which keeps their state."""

    def __init__(
        self,
        run: Run,
        progress: Progress,
        *,
        batch: int,
        weight_decay: float,
        checkpoint_s: float,
        ranks: Ranks = ALONE,
        tracking: Tracking = UNTRACKED,
    ) -> None:
        """`checkpoint_s` seconds of work are what a killed process loses at most, and one step."""
        self.run = run
        self._progress = progress
        self._batch = batch
        self._weight_decay = weight_decay
        self._checkpoint_s = checkpoint_s
        self._ranks = ranks
        self._tracking = tracking
        self._saved = 0.0

    def learn(self, lesson: Lesson, random: torch.Generator) -> None:
        """Train what the lesson says, from its beginning or from where an earlier run was.

        Every loss goes to `run.record.losses`. Raises CheckFailed for a loss that is not finite.
        """
        on_cuda = any(p.is_cuda for module in lesson.trained for p in module.parameters())
        # What this process draws elsewhere is none of a lesson's business.
        with torch.random.fork_rng([torch.cuda.current_device()] if on_cuda else []):
            self._learn(lesson, random)

    def _learn(self, lesson: Lesson, random: torch.Generator) -> None:
        midway = self._restored(lesson, random)
        if midway is None and lesson.prepare:
            lesson.prepare()
        per_epoch = joint_steps(lesson.images, self._batch)
        epoch, skip = (midway.epoch, midway.step) if midway else (0, 0)
        done = epoch * per_epoch + skip
        start = lesson.first_step + done
        descent = Descent(lesson.trained, lesson.cycle, self._weight_decay, start)
        if midway:
            descent.load_state_dict(midway.optimiser)
        self._progress.begin(lesson.name, lesson.epochs * per_epoch, done)
        for module in lesson.trained:
            module.train()
        computed = self._ranks.wrap(_Computed(lesson))
        meter = Meter(self._tracking, lesson.name)
        self._saved = time.monotonic()
        for finished in range(epoch + 1, lesson.epochs + 1):
            if midway and skip:
                random.set_state(midway.epoch_random)
            epoch_random = random.get_state()
            batches = list(joint_batches(lesson.images, self._batch, random))
            if midway and skip:
                random.set_state(midway.random)
            for step in range(skip, per_epoch):
                number = (finished - 1) * per_epoch + step + 1
                # What a net draws for itself (dropout) is a function of the step, on any device: there
                # is no state of it to keep, and each process draws its own.
                name = f"{lesson.name}, step {number}, process {self._ranks.rank}"
                torch.manual_seed(derived_seed(random.initial_seed(), name))
                parts = self._step(lesson, computed, batches[step], random, descent)
                if lesson.stepped:
                    lesson.stepped(number)
                record = self.run.record
                meter.step(record.steps, numbers(parts), descent.rate, sum(map(len, batches[step])))
                if step + 1 < per_epoch and self._due(step + 1):
                    self._save(lesson, descent, finished - 1, step + 1, epoch_random, random)
            skip = 0
            self._ranks.even_out(lesson.trained)
            last = bool(lesson.ended and lesson.ended(finished)) or finished == lesson.epochs
            if lesson.measure and (finished % lesson.measure_every == 0 or last):
                lesson.measure(finished)
            if last:
                break
            if self._due():
                self._save(lesson, descent, finished, 0, random.get_state(), random)
        meter.point(self.run.record.steps, descent.rate)
        self._progress.end()

    def _due(self, step: int = 0) -> bool:
        """Whether to write now, as the first process's clock has it."""
        if not self._ranks.alone and step % _ASK_EVERY_STEPS:
            return False
        return self._ranks.agree(time.monotonic() - self._saved >= self._checkpoint_s)

    def _step(
        self,
        lesson: Lesson,
        computed: nn.Module,
        index: tuple[Tensor, ...],
        random: torch.Generator,
        descent: Descent,
    ) -> Losses:
        drawn = lesson.draw(index, random)
        if self._ranks.alone:
            loss, parts = computed(*drawn)
        else:
            # All draw for all, so that it does not matter who computes what.
            mine = [some.rows(self._ranks.rows(len(some.index))) for some in drawn]
            with speaking():
                loss, parts = computed(*mine)
        if not math.isfinite(parts.total):
            raise CheckFailed(
                f"the loss of {lesson.name} is {parts.total}: the training diverged; "
                "choose a lower rate for this stage, or look for images or answers out of all range"
            )
        if self._ranks.alone:
            descent.step(loss)
        else:
            with speaking():
                descent.step(loss)
        self.run.record.losses.append(parts.total)
        self.run.record.steps += 1
        self._progress.advance(parts.total, images=sum(map(len, index)))
        made: Losses = parts
        return made

    def _restored(self, lesson: Lesson, random: torch.Generator) -> Midway | None:
        """Where an earlier run was in this lesson; the nets and `random` are then as they were."""
        midway = self.run.midway
        if midway is None or midway.stage != lesson.name:
            return None
        for key, net in lesson.nets.items():
            net.load_state_dict(self.run.nets[key])
        random.set_state(midway.random)
        return midway

    def _save(
        self,
        lesson: Lesson,
        descent: Descent,
        epoch: int,
        step: int,
        epoch_random: Tensor,
        random: torch.Generator,
    ) -> None:
        self._ranks.even_out(lesson.trained)
        self.run.pause(
            Midway(
                stage=lesson.name,
                epoch=epoch,
                step=step,
                optimiser=descent.state_dict(),
                epoch_random=epoch_random,
                random=random.get_state(),
            ),
            {key: net.state_dict() for key, net in lesson.nets.items()},
        )
        self._saved = time.monotonic()


class _Computed(nn.Module):
    """A lesson's loss as what a module answers: that is where gradients are exchanged from."""

    def __init__(self, lesson: Lesson) -> None:
        super().__init__()
        self.trained = nn.ModuleList(lesson.trained)
        self._loss = lesson.loss

    def forward(self, *drawn: Drawn) -> tuple[Tensor, Losses]:
        return self._loss(*drawn)
