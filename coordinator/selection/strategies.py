"""The strategies by name.

`cosine` and `sampled` are the paper's, `evidence` this kit's own, `logme` the published score on what
a teacher sees where it looks; `random` and `all` are what they must
beat, `oracle` is what no strategy can beat, and needs a labelled test set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from coordinator.selection.choice import (
    Evidence,
    Selection,
    Strategy,
    kept,
    require_at_most,
    require_sound,
)
from coordinator.selection.evidence import GreedySet, by_evidence, by_logme
from coordinator.selection.saliency import attention, probabilities
from edge_teacher.contract.errors import UsageError

Floats = NDArray[np.float64]

# A choice of teachers, by what is known of each: (probabilities, the highest first; k; dice) ->
# (weights, and for each teacher the reason).
_Choose = Callable[[Floats, int, np.random.Generator], tuple[Floats, list[str]]]

_MOST_SETS = 5000


def select(
    strategy: str,
    evidence: Evidence,
    k: int,
    rng: np.random.Generator,
) -> Selection:
    """Select by the strategy of that name.

    Raises UsageError for an unknown strategy, no teacher, or k greater than there are teachers;
    CheckFailed for what is no answer about this probe set.
    """
    chosen = strategy_named(strategy)
    require_sound(evidence, chosen)
    return chosen.select(evidence, k, rng)


def strategy_named(name: str) -> Strategy:
    """Raises UsageError if there is none of that name."""
    if name not in STRATEGIES:
        raise UsageError(
            f"There is no selection strategy {name!r}; it is one of {', '.join(STRATEGIES)}."
        )
    return STRATEGIES[name]


@dataclass(frozen=True)
class ByAttention:
    """Score every teacher by the cosine of its saliency maps, then choose by the probabilities."""

    name: str
    choose: _Choose
    reads_features: bool = False
    under_saliency: bool = False

    def select(self, evidence: Evidence, k: int, rng: np.random.Generator) -> Selection:
        looks = attention(evidence, evidence.teachers)
        scored = {name: looks[name].score + evidence.bonus(name) for name in looks}
        # Equal scores stay in the order of their names.
        names = sorted(looks, key=lambda name: -scored[name])
        scores = np.array([scored[name] for name in names])
        p = probabilities(scores)
        weights, reasons = self.choose(p, k, rng)
        return Selection(
            self.name,
            tuple(
                looks[name].told(
                    name,
                    score=looks[name].score,
                    probability=float(p[i]),
                    weight=float(weights[i]),
                    reason=reasons[i] + kept(evidence, name),
                )
                for i, name in enumerate(names)
            ),
        )


@dataclass(frozen=True)
class Oracle:
    """The set that turns out best, of all sets of k: for studies, since it must know the truth."""

    name: str = "oracle"
    reads_features: bool = True
    under_saliency: bool = False

    def select(self, evidence: Evidence, k: int, rng: np.random.Generator) -> Selection:
        names = evidence.teachers
        require_at_most(k, len(names))
        if evidence.judge is None:
            raise UsageError(
                "the oracle must know how good a set of teachers turns out to be: give labelled test "
                "images (data.test), or take another selection.strategy"
            )
        if comb(len(names), k) > _MOST_SETS:
            raise UsageError(
                f"the oracle would try all {comb(len(names), k):,} sets of {k} of {len(names)} teachers; "
                f"{_MOST_SETS:,} is the limit: choose a smaller selection.k"
            )
        judged = {found: evidence.judge(found) for found in combinations(names, k)}
        best = max(judged, key=lambda found: judged[found])
        looks = attention(evidence, names)
        # A teacher's own score: how good the sets are that it is in.
        score = {n: float(np.mean([v for s, v in judged.items() if n in s])) for n in names}
        p = probabilities(np.array([score[name] for name in names]))
        told = f"of the best of {len(judged)} sets ({judged[best]:.4f})"
        teachers = [
            looks[name].told(
                name,
                score=score[name],
                probability=float(p[i]),
                weight=1 / k if name in best else 0.0,
                reason=told if name in best else "not " + told,
            )
            for i, name in enumerate(names)
        ]
        return Selection(self.name, tuple(sorted(teachers, key=lambda t: (-t.weight, -t.score))))


def _top_k(p: Floats, k: int, rng: np.random.Generator) -> tuple[Floats, list[str]]:
    """The k most probable; weights are the softmax over the chosen, which is p over their sum."""
    require_at_most(k, len(p))
    weights = np.where(np.arange(len(p)) < k, p, 0.0)
    ranks = range(1, len(p) + 1)
    reasons = [
        f"rank {r} of {len(p)}, among the {k} best"
        if r <= k
        else f"rank {r} of {len(p)}, below the {k} best"
        for r in ranks
    ]
    return weights / weights.sum(), reasons


def _sampled(p: Floats, k: int, rng: np.random.Generator) -> tuple[Floats, list[str]]:
    """k draws from p with replacement, each of weight 1/k."""
    drawn = np.bincount(rng.choice(len(p), size=k, p=p), minlength=len(p))
    reasons = [
        f"drawn {n} of {k} times with probability {q:.3f}" for n, q in zip(drawn, p, strict=True)
    ]
    return drawn / k, reasons


def _random(p: Floats, k: int, rng: np.random.Generator) -> tuple[Floats, list[str]]:
    """k teachers by lot, whatever their scores: what a selection must beat."""
    require_at_most(k, len(p))
    weights = np.zeros(len(p))
    weights[rng.choice(len(p), size=k, replace=False)] = 1 / k
    return weights, ["drawn by lot" if w else "not drawn" for w in weights]


def _all(p: Floats, k: int, rng: np.random.Generator) -> tuple[Floats, list[str]]:
    """Every teacher, weighted by p; k is not used."""
    return p, ["all teachers take part"] * len(p)


STRATEGIES: Mapping[str, Strategy] = {
    "evidence": GreedySet("evidence", by_evidence),
    "logme": GreedySet("logme", by_logme, under_saliency=True),
    "cosine": ByAttention("cosine", _top_k),
    "sampled": ByAttention("sampled", _sampled),
    "random": ByAttention("random", _random),
    "all": ByAttention("all", _all),
    "oracle": Oracle(),
}
