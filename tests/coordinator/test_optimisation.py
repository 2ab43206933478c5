import torch
from torch import nn

from coordinator.optimisation import (
    Descent,
    OneCycle,
    derived_seed,
    shuffled_batches,
    stage_generator,
    steps_per_epoch,
)


def test_the_cycle_rises_and_falls_to_nothing() -> None:
    rates = [OneCycle(0.1, 100).rate(step) for step in range(100)]
    top = rates.index(max(rates))
    assert 15 <= top <= 25
    assert 0.099 < rates[top] <= 0.1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_a_descent_takes_the_rate_of_its_place_in_the_cycle() -> None:
    layer = nn.Linear(1, 1, bias=False)
    before = layer.weight.detach().clone()
    descent = Descent([layer], OneCycle(0.5, 10), weight_decay=0.0, start=4)
    descent.step(layer.weight.sum())
    # The first step of Nesterov momentum m is (1 + m) times the gradient, which is 1.
    expected = before - OneCycle(0.5, 10).rate(4) * 1.9
    assert torch.allclose(layer.weight, expected)


def test_batches_are_whole_and_cover_an_epoch() -> None:
    batches = list(shuffled_batches(10, 3, torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == [3] * steps_per_epoch(10, 3) == [3, 3, 3]
    assert len(torch.cat(batches).unique()) == 9
    assert [sorted(b.tolist()) for b in shuffled_batches(4, 64, torch.Generator())] == [
        [0, 1, 2, 3]
    ]


def test_every_stage_has_randomness_of_its_own_that_repeats() -> None:
    draws = {
        key: torch.rand(1, generator=stage_generator(*key)).item()
        for key in ((0, "round 1"), (0, "round 2"), (1, "round 1"), (0, "round 11"))
    }
    assert len(set(draws.values())) == 4
    assert draws[(0, "round 1")] == torch.rand(1, generator=stage_generator(0, "round 1")).item()
    assert derived_seed(3, "x") == derived_seed(3, "x") != derived_seed(3, "y")
