import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coordinator.amalgamation.discriminant import Discriminant
from coordinator.amalgamation.heads import TaskHead, fit_linear, fit_task_head, stratified_folds


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


def regression(noise: float, count: int = 90) -> TaskHead:
    x, y = clusters(count, noise, seed=0)
    part = stratified_folds(y, 3, np.random.default_rng(0))
    return fit_linear(
        *(x, torch.from_numpy(y), 3, clusters(300, noise, seed=1)[0], part, F.cross_entropy),
        lambda logits, truth: float((logits.argmax(1) == truth).mean()),
    )


def test_noise_asks_for_a_stronger_penalty() -> None:
    strong, weak = regression(3.0).penalty, regression(0.4).penalty
    assert strong is not None
    assert weak is not None
    assert strong > weak


def test_the_regression_is_the_optimum_of_the_penalised_loss() -> None:
    x, y = clusters(90, 1.0, seed=0)
    head = regression(1.0)
    assert head.penalty is not None
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    z = (x.double() - head.mean) / head.deviation
    loss = F.cross_entropy(z @ weight + bias, torch.from_numpy(y))
    loss = loss + head.penalty / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(g.abs().max() for g in gradients) < 1e-3


def correlated(count: int, seed: int, common: float = 1.0) -> tuple[torch.Tensor, np.ndarray]:
    """Four classes in 60 channels that have variations of 20 kinds in common."""
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(7)
    shared, means = fixed.standard_normal((20, 60)), 1.2 * fixed.standard_normal((4, 60))
    labels = np.arange(count) % 4
    x = means[labels] + rng.standard_normal((count, 20)) @ shared * common
    return torch.from_numpy(x + rng.standard_normal((count, 60))).float(), labels


def test_unlabelled_images_tell_along_what_the_classes_are_told_apart() -> None:
    x, y = correlated(40, seed=0)
    unseen, truth = correlated(2000, seed=1)

    def reached(head: TaskHead) -> float:
        return float((head.logits(unseen).argmax(1).numpy() == truth).mean())

    head = fit_task_head(x, y, 4, unseen, folds=4, seed=0)
    assert head.penalty is None
    part = stratified_folds(y, 4, np.random.default_rng(0))
    alone = fit_linear(
        *(x, torch.from_numpy(y), 4, unseen, part, F.cross_entropy),
        lambda logits, truth: float((logits.argmax(1) == truth).mean()),
    )
    assert reached(head) > reached(alone) + 0.05


def test_the_discriminants_are_those_of_means_and_covariance_within_the_classes() -> None:
    """With unlabelled images whose classes are beyond doubt, it is Fisher's own formula."""
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 3
    x = torch.from_numpy(rng.standard_normal((600, 5)) + 40 * np.eye(5)[labels])
    x = (x - x.mean(0)) / x.std(0, correction=0)
    one_hot = F.one_hot(torch.from_numpy(labels), 3).double()
    weight, bias = Discriminant(x[60:]).fit(x[:60], one_hot[:60])
    counted = torch.cat([x[:60]] * 3 + [x[60:]])
    of = np.concatenate([labels[:60]] * 3 + [labels[60:]])
    means = torch.stack([counted[of == c].mean(0) for c in range(3)])
    residue = counted - means[of]
    within = residue.T @ residue / len(counted) + 0.3 * torch.eye(5)
    expected = torch.linalg.solve(within, means.T)
    assert torch.allclose(weight, expected, rtol=0.02, atol=0.05)
    assert torch.allclose(bias, -0.5 * (means.T * expected).sum(0), rtol=0.02, atol=0.05)


def test_a_class_without_labels_is_no_image_s() -> None:
    x, y = correlated(80, seed=0)
    unseen, _ = correlated(500, seed=1)
    alone = fit_task_head(x, y, 4, unseen, folds=5, seed=0)
    wider = fit_task_head(x, 2 * y, 9, unseen, folds=5, seed=0)
    assert wider.penalty is None
    assert wider.temperature == alone.temperature
    found = wider.probabilities(unseen, 0.5)
    assert torch.allclose(found[:, ::2][:, :4], alone.probabilities(unseen, 0.5), atol=1e-6)
    assert not found[:, 1::2].any()


def test_a_discriminant_is_as_sure_as_it_is_right() -> None:
    x, y = correlated(80, seed=0)
    unseen, truth = correlated(2000, seed=1)
    head = fit_task_head(x, y, 4, unseen, folds=5, seed=0)
    sure = head.probabilities(unseen, 1.0).max(1).values.mean()
    right = (head.logits(unseen).argmax(1).numpy() == truth).mean()
    assert float(sure) == pytest.approx(right, abs=0.15)


def test_a_head_like_another_chooses_nothing() -> None:
    x, y = correlated(80, seed=0)
    unseen, _ = correlated(500, seed=1)
    first = fit_task_head(x, y, 4, unseen, folds=5, seed=0)
    again = fit_task_head(x, y, 4, unseen, folds=5, seed=0, like=first)
    assert torch.equal(again.weight, first.weight)
    assert again.temperature == first.temperature
    assert np.isnan(again.cv_score)
    other = regression(1.0)
    taken = fit_task_head(x, y, 4, unseen, folds=5, seed=0, like=other)
    assert taken.penalty == other.penalty
    assert np.isnan(taken.cv_score)


def test_guesses_that_are_mostly_wrong_are_not_believed() -> None:
    x, y = correlated(160, seed=0, common=4.0)
    unseen, _ = correlated(2000, seed=1, common=4.0)
    assert fit_task_head(x, y, 4, unseen, folds=4, seed=0).penalty is not None


def test_ten_labels_for_each_feature_are_plenty_for_a_regression() -> None:
    x, y = clusters(200, 1.0, seed=0)
    unlabelled = clusters(50, 1.0, seed=1)[0]
    assert fit_task_head(x, y, 3, unlabelled, folds=3, seed=0).penalty is not None
    few = fit_task_head(x[:199], y[:199], 3, unlabelled, folds=3, seed=0)
    assert few.penalty is None


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
