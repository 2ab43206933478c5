import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coordinator.amalgamation.heads import TaskHead, fit_task_head


def clusters(count: int, noise: float, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Three classes along three of twenty channels, whose scales differ by thousands."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    x = noise * rng.standard_normal((count, 20))
    x[np.arange(count), labels] += 1
    return torch.from_numpy(x * np.logspace(-2, 2, 20)).float() + 5, labels


def fit(noise: float, count: int = 90) -> TaskHead:
    x, y = clusters(count, noise, seed=0)
    return fit_task_head(x, y, 3, clusters(300, noise, seed=1)[0], folds=3, seed=0)


def test_a_head_generalises_and_its_estimate_is_honest() -> None:
    x, y = clusters(3000, 0.5, seed=2)
    head = fit(0.5)
    reached = (head.probabilities(x, 1.0).argmax(1).numpy() == y).mean()
    assert reached > 0.7
    assert head.cv_score == pytest.approx(reached, abs=0.12)


def test_noise_asks_for_a_stronger_penalty() -> None:
    assert fit(3.0).penalty > fit(0.4).penalty


def test_the_fit_is_the_optimum_of_the_penalised_loss() -> None:
    x, y = clusters(60, 1.0, seed=0)
    head = fit_task_head(x, y, 3, x, folds=3, seed=0)
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    z = (x.double() - head.mean) / head.deviation
    loss = F.cross_entropy(z @ weight + bias, torch.from_numpy(y))
    loss = loss + head.penalty / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(g.abs().max() for g in gradients) < 1e-3


def test_temperature_sharpens() -> None:
    x, _ = clusters(10, 1.0, seed=3)
    head = fit(1.0)
    plain, sharp = head.probabilities(x, 1.0), head.probabilities(x, 0.5)
    assert torch.allclose(plain.sum(1), torch.ones(10))
    squared = plain.square() / plain.square().sum(1, keepdim=True)
    assert torch.allclose(sharp, squared, atol=1e-5)


def test_a_layer_can_take_the_head_over() -> None:
    x, _ = clusters(10, 1.0, seed=3)
    head, layer = fit(1.0), nn.Linear(20, 3)
    head.write_to(layer)
    assert torch.allclose(torch.softmax(layer(x), 1), head.probabilities(x, 1.0), atol=1e-3)
    assert layer.weight.requires_grad


def test_the_same_seed_gives_the_same_head_and_dead_channels_do_no_harm() -> None:
    x, y = clusters(60, 1.0, seed=0)
    x[:, 7] = 4.0
    first, again = (fit_task_head(x, y, 3, x, folds=3, seed=5) for _ in range(2))
    assert torch.equal(first.weight, again.weight)
    assert torch.isfinite(first.weight).all()


def test_a_class_with_one_image_is_no_obstacle() -> None:
    x, y = clusters(31, 0.5, seed=0)
    y[:30] %= 2
    y[30] = 2
    head = fit_task_head(x, y, 3, x, folds=5, seed=0)
    assert torch.isfinite(head.probabilities(x, 0.5)).all()
