"""What a training run tells whoever is watching."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from the training thread; a stage begins, advances `steps` times, and ends."""

    def begin(self, stage: str, steps: int, done: int = 0) -> None:
        """A stage of so many steps begins: "scratch", "warm-up", "ask", "round 3", …

        `done` of them were done by an earlier process, which this one goes on for.
        """
        ...

    def advance(self, loss: float | None = None, images: int = 0) -> None:
        """One step of the stage is done; one of training has a loss, and a number of images."""
        ...

    def end(self) -> None:
        """The stage is over."""
        ...

    def say(self, sentence: str) -> None:
        """Something worth a line: who was selected, what accuracy was reached."""
        ...


class Silent:
    """A Progress that tells nobody."""

    def begin(self, stage: str, steps: int, done: int = 0) -> None:
        pass

    def advance(self, loss: float | None = None, images: int = 0) -> None:
        pass

    def end(self) -> None:
        pass

    def say(self, sentence: str) -> None:
        pass
