"""The damping that cross-validation chooses: against leaving examples out one by one, and as a part of the scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trak.damping import CANDIDATES, choose_damping
from lightning_trak.scores import TrainFeatures, precondition, scores, self_influence


def problem(noise, n=40, k=12, seed=0, weighted=True):
    """A regression of q / w on features of which only some matter, in float64."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, k)) * 0.7 ** np.arange(k)
    weights = rng.uniform(0.05, 1, size=n) if weighted else np.ones(n)
    response = features[:, :3].sum(1) + noise * rng.normal(size=n)
    return features, weights * response, weights


def left_out_error(features, loss_grad, weights, strength):
    """Fit without each example in turn, and predict it."""
    errors = []
    for i in range(len(features)):
        rest = np.arange(len(features)) != i
        x, w = features[rest], weights[rest]
        theta = np.linalg.solve((x.T * w) @ x + strength * np.eye(x.shape[1]), x.T @ loss_grad[rest])
        errors.append(np.sqrt(weights[i]) * abs(loss_grad[i] / weights[i] - features[i] @ theta))
    return np.mean(errors)


def tensors(*arrays):
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]


@pytest.mark.parametrize("weighted", [True, False])
def test_choice_is_that_of_leaving_examples_out_one_by_one(weighted):
    chosen = set()
    for seed in range(4):
        for noise in (0.01, 1.0, 3.0, 30.0):
            features, loss_grad, weights = problem(noise, seed=seed, weighted=weighted)
            scale = np.mean(np.diag((features.T * weights) @ features))
            errors = [left_out_error(features, loss_grad, weights, damping * scale) for damping in CANDIDATES]
            expected = CANDIDATES[int(np.argmin(errors))]
            assert choose_damping(*tensors(features, loss_grad, weights), scale) == expected
            chosen.add(expected)
    assert len(chosen) >= 3


def test_examples_without_curvature_do_not_decide():
    features, loss_grad, weights = problem(1.0)
    scale = np.mean(np.diag((features.T * weights) @ features))
    expected = choose_damping(*tensors(features, loss_grad, weights), scale)
    more = (
        np.concatenate([features, features]),
        np.concatenate([loss_grad, loss_grad * 0]),
        np.concatenate([weights, weights * 0]),
    )
    assert choose_damping(*tensors(*more), scale) == expected


@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_auto_is_the_damping_chosen(noise, curvature):
    features, loss_grad, weights = problem(noise)
    train, targets = (
        TrainFeatures(*(array.astype(np.float32) for array in (features, loss_grad, weights))),
        torch.eye(12),
    )
    used = weights if curvature else np.ones_like(weights)
    scale = np.mean(np.diag((features.T * used) @ features))
    damping = choose_damping(*tensors(features, loss_grad, used), scale)
    auto = precondition(train, targets, damping="auto", curvature=curvature)
    torch.testing.assert_close(auto, precondition(train, targets, damping=damping, curvature=curvature))
    own = self_influence(train, damping="auto", curvature=curvature)
    torch.testing.assert_close(
        own,
        scores(
            [train], [precondition(train, torch.tensor(train.features), damping=damping, curvature=curvature)]
        ).mean.diagonal(),
    )


def test_choice_does_not_depend_on_the_number_of_examples(monkeypatch):
    """A sample of a large train set decides as the whole does."""
    features, loss_grad, weights = problem(3.0, n=900)
    train = TrainFeatures(*(array.astype(np.float32) for array in (features, loss_grad, weights)))
    whole = precondition(train, torch.eye(12), damping="auto", curvature=True)
    monkeypatch.setattr("lightning_trak.scores.EXAMPLES", 300)
    torch.testing.assert_close(precondition(train, torch.eye(12), damping="auto", curvature=True), whole)


def test_a_kernel_of_zeros_is_named():
    train = TrainFeatures(np.zeros((5, 3), "f4"), np.zeros(5, "f4"), np.ones(5, "f4"))
    with pytest.raises(ValueError, match="mean diagonal of 0"):
        precondition(train, torch.eye(3), damping="auto", curvature=True)
