"""One stage of a training run, with what every stage needs: data, state, loop, learning curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from coordinator.checkpoints import CurvePoint, Run
from coordinator.config import Config
from coordinator.data import SeveralTasks
from coordinator.loop import Drawn, Lesson, Loop
from coordinator.measures import first_metric, measured
from coordinator.optimisation import stage_generator
from coordinator.progress import Progress
from coordinator.ranks import Ranks
from coordinator.student import Student
from coordinator.tracking import Tracking
from edge_teacher.contract.errors import CheckFailed, FedsaError


@dataclass(frozen=True)
class Stage:
    """`name` is unique in the run, and what its randomness is derived from."""

    name: str
    config: Config
    data: SeveralTasks
    run: Run
    progress: Progress
    ranks: Ranks
    tracking: Tracking

    def resumed(self, **nets: nn.Module) -> bool:
        """Whether an earlier run finished this stage; then the nets are as it left them."""
        if not self.run.has(self.name):
            return False
        for key, net in nets.items():
            net.load_state_dict(self.run.nets[key])
        return True

    def finish(self, **nets: nn.Module) -> None:
        self.progress.end()
        self.run.finish(self.name, {key: net.state_dict() for key, net in nets.items()})

    def generator(self) -> torch.Generator:
        return stage_generator(self.config.seed, self.name)

    def learn(self, lesson: Lesson, random: torch.Generator) -> None:
        config = self.config
        loop = Loop(
            self.run,
            self.progress,
            batch=config.batch,
            weight_decay=config.weight_decay,
            checkpoint_s=config.checkpoint_s,
            ranks=self.ranks,
            tracking=self.tracking,
        )
        try:
            loop.learn(lesson, random)
        except FedsaError:
            raise
        except Exception as error:
            module = config.student.module
            if not module:
                raise
            # The code is the user's, and may raise anything at any step.
            raise CheckFailed(
                f"the student {module} fails in {self.name}: {type(error).__name__}: {error}"
            ) from error

    def drawn(self, index: Tensor, generator: torch.Generator) -> Drawn:
        return Drawn.of(index, self.config.shift, generator)

    def measure(self, images: int, student: Student) -> None:
        """Add a point to the learning curve. The test set is for reports: nothing depends on it."""
        found, record = measured(student, self.data), self.run.record
        reached = first_metric(found) if found else None
        loss = self.ranks.mean(float(np.mean(record.losses)))
        record.curve.append(CurvePoint(self.name, images, loss, reached, found))
        record.losses.clear()
        if reached is None:
            return
        network = "scratch" if self.name == "scratch" else "fedsa"
        accuracies = {f"accuracy/{network}": reached}
        if len(self.data.tasks) > 1:
            accuracies |= {
                f"accuracy/{network}/{name}": first_metric({name: metrics})
                for name, metrics in found.items()
            }
        self.tracking.write(record.steps, accuracies)
