from __future__ import annotations

import math

import pytest
import torch

from coordinator.amalgamation.uncertainty import Uncertainty, shares, weighed

PRIOR = {"a": 0.75, "b": 0.25}


def learn(losses: dict[str, float], steps: int, rate: float = 0.5) -> dict[str, Uncertainty]:
    found = {name: Uncertainty() for name in losses}
    descent = torch.optim.SGD([u.log_variance for u in found.values()], lr=rate)
    for _ in range(steps):
        descent.zero_grad()
        weighed({n: torch.tensor(v) for n, v in losses.items()}, PRIOR, found).backward()
        descent.step()
    return found


def test_they_begin_as_the_selection_has_them() -> None:
    fresh = {name: Uncertainty() for name in PRIOR}
    assert shares(PRIOR, fresh) == pytest.approx(PRIOR)
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(4.0)}
    assert float(weighed(losses, PRIOR, fresh).detach()) == pytest.approx(0.75 * 2 + 0.25 * 4)


def test_at_last_a_teacher_counts_by_the_inverse_of_its_loss() -> None:
    """The stationary point of Kendall's objective: s_i = log L_i."""
    losses = {"a": 0.8, "b": 0.2}
    found = learn(losses, 400)
    for name, loss in losses.items():
        assert float(found[name].log_variance.detach()) == pytest.approx(math.log(loss), abs=1e-3)
    expected = {name: PRIOR[name] / losses[name] for name in losses}
    whole = sum(expected.values())
    assert shares(PRIOR, found) == pytest.approx({n: v / whole for n, v in expected.items()})


def test_the_student_descends_the_weighed_hints_alone() -> None:
    hint = torch.tensor(0.5, requires_grad=True)
    other = torch.tensor(0.1, requires_grad=True)
    found = learn({"a": 0.5, "b": 0.1}, 50)
    now = shares(PRIOR, found)
    weighed({"a": hint, "b": other}, PRIOR, found).backward()
    assert float(hint.grad) == pytest.approx(now["a"])  # type: ignore[arg-type]
    assert float(other.grad) == pytest.approx(now["b"])  # type: ignore[arg-type]


def test_one_batch_that_is_far_off_does_not_silence_a_teacher() -> None:
    found = learn({"a": 1e9, "b": 0.5}, 1)
    assert shares(PRIOR, found)["a"] > 0.6


def test_one_that_is_alone_counts_whole() -> None:
    found = learn({"a": 0.3, "b": 0.5}, 20)
    hint = torch.tensor(0.4)
    assert float(weighed({"a": hint}, {"a": 1.0}, found).detach()) == pytest.approx(0.4)


def test_no_step_waits_for_the_device() -> None:
    """Tensors without values, of which no number can be had."""
    found = {name: Uncertainty().to("meta") for name in PRIOR}
    losses = {name: torch.zeros((), device="meta") for name in PRIOR}
    assert weighed(losses, PRIOR, found).is_meta
