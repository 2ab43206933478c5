"""What a training run tells whoever is watching."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from the training thread; a stage begins, advances `steps` times, and ends."""

    def begin(self, stage: str, steps: int) -> None:
        """A stage of so many steps begins: "scratch", "warm-up", "ask <teacher>", "round 3", …"""
        ...

    def advance(self, loss: float | None = None) -> None:
        """One step of the stage is done, with this loss where it is a step of training."""
        ...

    def end(self) -> None:
        """The stage is over."""
        ...

    def say(self, sentence: str) -> None:
        """Something worth a line: who was selected, what accuracy was reached."""
        ...


class Silent:
    """A Progress that tells nobody."""

    def begin(self, stage: str, steps: int) -> None:
        pass

    def advance(self, loss: float | None = None) -> None:
        pass

    def end(self) -> None:
        pass

    def say(self, sentence: str) -> None:
        pass
