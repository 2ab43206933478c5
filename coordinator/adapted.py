"""What of the fine-tuning was kept, for the checkpoint and the report."""

from __future__ import annotations

import msgspec


class Adapted(msgspec.Struct, frozen=True, kw_only=True):
    """Which weights the fine-tuning ended with.

    Attributes:
        averaged: over how many steps they are the mean; 0: they are those of one step.
        held_out: labelled images that nothing was learnt from, and that the epoch was chosen by; 0: none.
        epoch: after which they were so; 0 is before the first, with fresh heads only.
        epochs: how many there were, before it stopped.
        scores: on the held-out images, before the first epoch and after each, a fraction; of several tasks
            the mean.
        metric: what the scores are, in words; empty where nothing was held out.
    """

    averaged: int = 0
    held_out: int = 0
    epoch: int
    epochs: int
    scores: tuple[float, ...] = ()
    metric: str = ""


def in_words(adapted: Adapted) -> str:
    """What goes on after "the fine-tuning"."""
    weights = "the weights"
    if adapted.averaged:
        weights = f"the mean weights of {adapted.averaged} step{'s' * (adapted.averaged != 1)}"
    if not adapted.held_out:
        return f"ended with {weights}."
    when = "before its first epoch" if not adapted.epoch else f"after epoch {adapted.epoch}"
    reached = f"{adapted.scores[adapted.epoch]:.1%} on {adapted.held_out} held-out labels"
    last = f"{adapted.scores[adapted.epochs]:.1%} after epoch {adapted.epochs}"
    compared = "" if adapted.epoch == adapted.epochs else f", against {last}, its last"
    return f"ended with {weights} it had {when}: by {adapted.metric}, {reached}{compared}."
