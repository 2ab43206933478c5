"""The proof a student brings along: its answers at export, which every runtime here must give again."""

from __future__ import annotations

import io
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_teacher.bundle import Bundle, StudentCard
from edge_teacher.contract.decisions import decisions
from edge_teacher.contract.errors import CheckFailed
from edge_teacher.contract.images import check_images
from edge_teacher.runtime import Model, Session, run_in_batches


class Proof(NamedTuple):
    agreement: float
    """Share of the decisions on the canary images that are as at export."""
    ms_per_image: float


class Canary:
    """Of one bundle: holds every session that would answer to it."""

    def __init__(self, found: Bundle, card: StudentCard) -> None:
        """Raises CheckFailed if a file is missing or cannot be read."""
        self._card = card
        self._images = check_images(_array(found.file(card.canary_images)))
        self._expected = {
            dialect: _array(found.file(name)) for dialect, name in card.canary_logits.items()
        }
        self.proofs: dict[str, Proof] = {}
        """Of the dialects that passed."""

    def model(self, found: Bundle) -> Model:
        """What a runtime opens. Raises CheckFailed if a file is missing."""
        card = self._card
        return Model(
            name=f"version {card.version} of {card.task!r}",
            graphs={dialect: found.file(name) for dialect, name in card.graphs.items()},
            size=card.input_size,
            probe=self._images,
            accept=self.prove,
        )

    def prove(self, session: Session, dialect: str) -> None:
        """Raises CheckFailed if `session`, which runs that dialect, does not answer as at export."""
        card = self._card
        if dialect not in self._expected:
            raise CheckFailed(f"the student {card.task!r} has no canary logits for {dialect}")
        images, expected = self._images, self._expected[dialect]
        started = time.perf_counter()
        logits = run_in_batches(session, images, "logits")
        elapsed_ms = (time.perf_counter() - started) * 1e3
        if (
            not logits.shape == expected.shape
            or logits.shape[:2] != (len(images), len(card.classes))
            or not np.isfinite(logits).all()
        ):
            raise CheckFailed(
                f"the student {card.task!r} gives logits {list(logits.shape)} on its canary batch, "
                f"not finite {list(expected.shape)} like its {len(card.classes)} classes"
            )
        answers, right = (decisions(values, card.decision) for values in (logits, expected))
        agreement = float((answers == right).mean())
        if agreement < card.canary_agreement:
            raise CheckFailed(
                f"version {card.version} of {card.task!r} answers {agreement:.1%} of its canary "
                f"batch as at export, and must answer {card.canary_agreement:.1%}"
            )
        self.proofs[dialect] = Proof(agreement, elapsed_ms / len(images))


def _array(data: bytes) -> NDArray[np.generic]:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CheckFailed(f"the canary batch cannot be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise CheckFailed("the canary batch is an archive of arrays, and must be one array")
    return array
