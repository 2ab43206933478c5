import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coordinator.selection import (
    STRATEGIES,
    Evidence,
    common_size,
    probabilities,
    resize_maps,
    select,
    similarities,
    transfer_distance,
)
from edge_teacher.contract.errors import CheckFailed, UsageError

# Saliency maps come from float32 graphs; below the least normal number half of a map may be zero.
maps = arrays(np.float32, (5, 4, 4), elements=st.floats(0, 1, width=32, allow_subnormal=False))
unit = st.floats(0, 1, width=32)
RNG = np.random.default_rng


def evidence(*teachers: np.ndarray, student: np.ndarray | None = None) -> Evidence:
    student = RNG(0).random((5, 4, 4), np.float32) if student is None else student
    names = [f"t{i}" for i in range(len(teachers))]
    return Evidence(
        student,
        dict(zip(names, teachers, strict=True)),
        targets=np.eye(2, dtype=np.float32)[[0, 1, 0, 1, 1]],
        features={n: RNG(i).random((5, 3), np.float32) for i, n in enumerate(names)},
        judge=lambda chosen: sum(int(name[1:]) for name in chosen),
    )


def random_maps(seed: int, size: int = 4) -> np.ndarray:
    return RNG(seed).random((5, size, size), np.float32)


@given(maps, maps)
def test_similarity_is_the_formula_between_a_half_and_one(a: np.ndarray, b: np.ndarray) -> None:
    found = similarities(a, b, (4, 4))
    for x, y, s in zip(a.astype(float), b.astype(float), found, strict=True):
        norms = np.sqrt((x**2).sum()) * np.sqrt((y**2).sum())
        # A flat map has no direction: its cosine is defined as 0.
        cosine = (x * y).sum() / norms if norms > 0 else 0.0
        assert s == pytest.approx(0.5 + 0.5 * min(cosine, 1.0), abs=1e-9)
    assert ((found >= 0.5) & (found <= 1)).all()
    assert 1 <= transfer_distance(found) <= 2 + 1e-12


@given(maps)
def test_a_map_agrees_wholly_with_itself_at_any_brightness(a: np.ndarray) -> None:
    flat = ~a.any(axis=(1, 2))
    s = similarities(a, a / 2, (4, 4))
    assert s[~flat] == pytest.approx(1.0)
    assert (s[flat] == 0.5).all()


def test_disjoint_and_flat_maps_are_no_evidence() -> None:
    left, right = np.zeros((2, 1, 4, 4), np.float32)
    left[:, :, :2] = right[:, :, 2:] = 1
    assert similarities(left, right, (4, 4)).tolist() == [0.5]
    assert similarities(left, np.zeros_like(left), (4, 4)).tolist() == [0.5]


def test_maps_are_compared_at_the_largest_size() -> None:
    found = evidence(random_maps(1, 8), random_maps(2, 5))
    assert common_size(found) == (8, 8)
    # Bilinear with pixel centres aligned: a ramp stays a ramp inside, and ends do not move out.
    ramp = np.array([[[0.0, 1.0]]], np.float32)
    assert resize_maps(ramp, (1, 4)).ravel().tolist() == [0, 0.25, 0.75, 1]
    assert len(select("cosine", found, 1, RNG(0)).weights) == 1


@given(arrays(np.float64, st.integers(1, 9), elements=st.floats(0, 1)))
def test_probabilities_are_a_softmax_of_scores_rescaled(scores: np.ndarray) -> None:
    p = probabilities(scores)
    assert p.sum() == pytest.approx(1)
    # Rescaled to [0, 1], the best is at most e times as probable as the worst.
    spread = scores.max() - scores.min()
    assert p.max() / p.min() == pytest.approx(np.e if spread > 1e-9 else 1.0)
    order = np.argsort(scores)
    assert (np.diff(p[order]) >= -1e-12).all()


def test_equal_teachers_are_equally_probable() -> None:
    same = random_maps(1)
    chosen = select("all", evidence(same, same.copy(), same.copy()), 3, RNG(0))
    assert [t.probability for t in chosen.teachers] == pytest.approx([1 / 3] * 3)


def test_top_k_takes_the_best_and_weighs_them_by_softmax() -> None:
    student = random_maps(0)
    near = np.clip(student + 0.1 * random_maps(7), 0, 1)
    found = select("cosine", evidence(random_maps(3), near, student, student=student), 2, RNG(0))
    assert [t.teacher for t in found.teachers] == ["t2", "t1", "t0"]
    assert set(found.weights) == {"t1", "t2"}
    best, second, worst = found.teachers
    assert best.distance == pytest.approx(1)
    assert best.score == pytest.approx(2 - best.distance)
    assert best.similarity > second.similarity > worst.similarity
    assert found.weights["t2"] == pytest.approx(
        best.probability / (best.probability + second.probability)
    )
    assert "rank 3 of 3" in worst.reason
    assert not worst.selected


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_sampled_draws_k_with_replacement(seed: int, k: int) -> None:
    found = select("sampled", evidence(random_maps(1), random_maps(2)), k, RNG(seed))
    drawn = np.array([t.weight for t in found.teachers]) * k
    assert drawn == pytest.approx(drawn.round())
    assert drawn.sum() == pytest.approx(k)


def test_sampled_follows_the_probabilities() -> None:
    shown = evidence(random_maps(0), random_maps(2), random_maps(3))
    found = select("sampled", shown, 20_000, RNG(1))
    for teacher in found.teachers:
        assert teacher.weight == pytest.approx(teacher.probability, abs=0.02)


def test_random_ignores_the_scores() -> None:
    shown = evidence(random_maps(0), random_maps(2), random_maps(3))
    chosen = {name for seed in range(40) for name in select("random", shown, 1, RNG(seed)).weights}
    assert chosen == {"t0", "t1", "t2"}


@given(st.sampled_from(sorted(STRATEGIES)), st.integers(0, 99), st.integers(1, 3))
def test_every_strategy_weighs_to_one_and_repeats(strategy: str, seed: int, k: int) -> None:
    shown = evidence(random_maps(1), random_maps(2, 5), random_maps(3, 6))
    found = select(strategy, shown, k, RNG(seed))
    assert sum(found.weights.values()) == pytest.approx(1)
    assert len(found.teachers) == 3
    assert all(t.reason for t in found.teachers)
    assert found == select(strategy, shown, k, RNG(seed))


def test_flat_maps_are_counted() -> None:
    flat = random_maps(1)
    flat[:2] = 0
    assert select("all", evidence(flat), 1, RNG(0)).teachers[0].flat_maps == 2


def test_what_cannot_be_selected_is_said() -> None:
    one = evidence(random_maps(1))
    with pytest.raises(UsageError, match="k is 2, and only 1 teacher answered"):
        select("cosine", one, 2, RNG(0))
    with pytest.raises(UsageError, match="no teacher"):
        select("cosine", evidence(), 1, RNG(0))
    with pytest.raises(UsageError, match="'best'; it is one of evidence, logme, cosine, sampled"):
        select("best", one, 1, RNG(0))
    with pytest.raises(CheckFailed, match=r"t0 .* \[4, 4, 4\] for 5"):
        select("all", evidence(random_maps(1)[:4]), 1, RNG(0))
    for bad in (-1.0, np.nan, np.inf):
        broken = random_maps(1)
        broken[0, 0, 0] = bad
        with pytest.raises(CheckFailed, match="t0 gave a saliency map with negative or non-finite"):
            select("all", evidence(broken), 1, RNG(0))
