"""The evidence of labels: against the definition, and a set that adds up."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from coordinator.selection import Evidence, select
from coordinator.selection.logme import logme
from coordinator.selection.marginal import kernel, log_evidence
from edge_teacher.contract.errors import CheckFailed, UsageError

RNG = np.random.default_rng


def labels(images: int, classes: int) -> np.ndarray:
    return np.arange(images) % classes


def targets(y: np.ndarray) -> np.ndarray:
    return np.eye(y.max() + 1, dtype=np.float32)[y]


def telling(y: np.ndarray, about: set[int], seed: int, width: int = 8) -> np.ndarray:
    """Features that tell some classes from the rest, and nothing else."""
    rng = RNG(seed)
    centres = rng.normal(0, 1.5, (y.max() + 1, width))
    shown = np.where(np.isin(y, list(about))[:, None], centres[y], 0)
    return (shown + rng.normal(0, 1, (len(y), width))).astype(np.float32)


def evidence(y: np.ndarray, features: dict[str, np.ndarray]) -> Evidence:
    maps = {name: np.ones((len(y), 2, 2), np.float32) for name in features}
    return Evidence(
        np.ones((len(y), 2, 2), np.float32), maps, targets=targets(y), features=features
    )


def test_it_is_the_density_of_the_labels_under_the_model() -> None:
    """At the best of many r and b, log N(t; 0, b (r K + I)) by an independent implementation."""
    y = labels(24, 2)
    k = kernel(telling(y, {0, 1}, 1))
    t = targets(y)[:, 0].astype(float)
    t = (t - t.mean()) / t.std()
    scale = np.linalg.eigvalsh(k).mean()
    best = max(
        float(
            MultivariateNormal(
                torch.zeros(24, dtype=torch.float64),
                torch.from_numpy(b * (r / scale * k + np.eye(24))),
            ).log_prob(torch.from_numpy(t))
        )
        for r in np.logspace(-3, 2.5, 23)
        for b in np.linspace(0.02, 1.5, 150)
    )
    assert log_evidence(k, targets(y)) == pytest.approx(best / 24, abs=2e-3)


def test_features_that_tell_the_labels_have_more_evidence_than_noise() -> None:
    y = labels(60, 3)
    told = log_evidence(kernel(telling(y, {0, 1, 2}, 1)), targets(y))
    noise = log_evidence(kernel(RNG(2).normal(size=(60, 8)).astype(np.float32)), targets(y))
    nothing = log_evidence(kernel(np.ones((60, 8), np.float32)), targets(y))
    assert told > noise + 0.1
    assert noise == pytest.approx(nothing, abs=0.05)


def test_scale_shift_and_sign_of_features_do_not_count() -> None:
    y = labels(40, 2)
    x = np.abs(telling(y, {0, 1}, 3))
    assert log_evidence(kernel(x * 1e4), targets(y)) == pytest.approx(
        log_evidence(kernel(x), targets(y)), abs=1e-6
    )


def test_logme_is_the_greatest_density_of_the_labels_under_its_model() -> None:
    """max over a and b of log N(t; 0, I / b + Phi Phi^T / a), by an independent implementation."""
    y = labels(24, 2)
    x = telling(y, {0, 1}, 1)
    centred = (x - x.mean(0)).astype(float)
    total = 0.0
    for t in (targets(y) - targets(y).mean(0)).T.astype(float):
        total += max(
            float(
                MultivariateNormal(
                    torch.zeros(24, dtype=torch.float64),
                    torch.from_numpy(np.eye(24) / b + centred @ centred.T / a),
                ).log_prob(torch.from_numpy(t))
            )
            for a in np.logspace(-1, 3, 81)
            for b in np.logspace(-1, 3, 81)
        )
    assert logme(x, targets(y)) == pytest.approx(total / 24 / 2, abs=2e-3)


def test_logme_of_features_that_say_nothing() -> None:
    y = labels(30, 3)
    nothing = logme(np.ones((30, 5), np.float32), targets(y))
    assert np.isfinite(nothing)
    assert logme(telling(y, {0, 1, 2}, 1), targets(y)) > nothing + 0.1


def test_a_class_without_labels_counts_for_nothing_in_logme() -> None:
    y = labels(40, 4)
    x = telling(y, {0, 1}, 1)
    never, always = np.zeros((40, 1), np.float32), np.ones((40, 1), np.float32)
    with_them = np.concatenate([never, targets(y), always], axis=1)
    assert logme(x, with_them) == logme(x, targets(y))
    assert logme(x, np.concatenate([never, always], axis=1)) == 0


def test_an_offset_of_features_or_targets_does_not_count_in_logme() -> None:
    y = labels(40, 2)
    x = telling(y, {0, 1}, 1)
    told = logme(x, targets(y))
    assert logme(x + 3, targets(y)) == pytest.approx(told, abs=1e-4)
    assert logme(x, targets(y) + 3) == pytest.approx(told, abs=1e-9)


@pytest.mark.parametrize("strategy", ["evidence", "logme"])
def test_the_second_teacher_is_the_one_that_adds_what_the_first_lacks(strategy: str) -> None:
    y = labels(120, 4)
    best = telling(y, {0, 1, 2}, 1)
    copy = best + RNG(9).normal(0, 0.01, best.shape).astype(np.float32)
    other = telling(y, {3}, 5)
    useless = RNG(7).normal(size=(120, 30)).astype(np.float32)
    shown = evidence(y, {"best": best, "copy": copy, "other": other, "useless": useless})
    found = select(strategy, shown, 2, RNG(0))
    assert "other" in found.weights
    assert "useless" not in found.weights
    assert set(found.weights.values()) == {0.5}
    # Alone the copy is as good as the first; the reason says what it would have given in the set.
    scores = {t.teacher: t for t in found.teachers}
    assert scores["copy"].score > scores["other"].score
    assert "in place of other" in scores["useless"].reason


def test_one_teacher_is_the_one_with_the_most_evidence() -> None:
    y = labels(60, 3)
    shown = evidence(y, {"a": telling(y, {0}, 1), "b": telling(y, {0, 1, 2}, 2)})
    assert select("evidence", shown, 1, RNG(0)).weights == {"b": 1.0}


def test_several_labels_for_an_image_will_do() -> None:
    y = labels(60, 3)
    both = np.maximum(targets(y), targets(np.roll(y, 1)))
    told = log_evidence(kernel(telling(y, {0, 1, 2}, 1)), both)
    assert told > log_evidence(kernel(np.ones((60, 4), np.float32)), both) + 0.1


def test_the_oracle_takes_the_set_that_turns_out_best() -> None:
    y = labels(12, 2)
    names = ["a", "b", "c", "d"]
    shown = evidence(y, {n: telling(y, {0}, i) for i, n in enumerate(names)})
    with pytest.raises(UsageError, match=r"data\.test"):
        select("oracle", shown, 2, RNG(0))
    worth = {("a", "c"): 0.9}
    judged = Evidence(
        shown.student_maps,
        shown.teacher_maps,
        features=shown.features,
        judge=lambda chosen: worth.get(tuple(chosen), 0.5),
    )
    assert set(select("oracle", judged, 2, RNG(0)).weights) == {"a", "c"}


def test_without_sound_features_there_is_no_evidence() -> None:
    y = labels(12, 2)
    good = telling(y, {0}, 1)
    with pytest.raises(CheckFailed, match="b gave features of shape \\[3, 8\\]"):
        select("evidence", evidence(y, {"a": good, "b": good[:3]}), 1, RNG(0))
    bad = good.copy()
    bad[0, 0] = np.nan
    with pytest.raises(CheckFailed, match="b gave features that are not finite"):
        select("evidence", evidence(y, {"a": good, "b": bad}), 1, RNG(0))


@pytest.mark.parametrize("strategy", ["evidence", "cosine"])
def test_who_was_selected_last_stays_unless_another_is_better_by_more(strategy: str) -> None:
    y = labels(60, 3)
    features = {"a": telling(y, {0}, 1), "b": telling(y, {0, 1, 2}, 2)}
    rng = RNG(3)
    student = rng.random((60, 4, 4), np.float32)
    maps = {"a": rng.random((60, 4, 4), np.float32), "b": student}

    def chosen(sticky: float, current: tuple[str, ...]) -> set[str]:
        shown = Evidence(
            student, maps, targets=targets(y), features=features, current=current, sticky=sticky
        )
        return set(select(strategy, shown, 1, RNG(0)).weights)

    assert chosen(0.0, ("a",)) == {"b"}
    assert chosen(0.001, ("a",)) == {"b"}
    assert chosen(5.0, ("a",)) == {"a"}
    assert chosen(5.0, ()) == {"b"}
    shown = Evidence(
        student, maps, targets=targets(y), features=features, current=("a",), sticky=5.0
    )
    told = {t.teacher: t for t in select(strategy, shown, 1, RNG(0)).teachers}
    # The score is what the strategy made of a teacher, and the reason says what else counted.
    assert told["a"].score < told["b"].score
    assert "selected before, which counts 5" in told["a"].reason
    assert "best of all" not in told["a"].reason
    assert "selected before" not in told["b"].reason
