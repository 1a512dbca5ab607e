"""Weights of kinds of scores, against ridge regression by NumPy, and the kinds against other estimators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trak.influence import Estimator, Kinds, Options, TrainFeatures, fit_weights
from tests.influence.sparse import Sparse, sparse

N, M, K, SUBSETS = 40, 7, 6, 12
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, K)).astype("f4")
TARGETS = torch.from_numpy(RNG.normal(size=(M, K)).astype("f4"))
W = RNG.uniform(0.1, 0.9, size=N).astype("f4")
MASKS = torch.from_numpy(RNG.uniform(size=(SUBSETS, N)) < 0.5)


def ridge_by_numpy(predicted, actual, usual, ridge):
    """The normal equations as a least-squares problem with more rows, in float64."""
    p = (predicted - predicted.mean(1, keepdims=True)).reshape(len(predicted), -1)
    y = (actual - actual.mean(0)).flatten()
    usual_sum = usual @ p
    prior = usual * (usual_sum @ y) / (usual_sum @ usual_sum)
    strength = ridge * (p**2).sum(1).mean()
    rows = np.vstack([p.T, np.sqrt(strength) * np.eye(len(p))])
    return np.linalg.lstsq(rows, np.concatenate([y, np.sqrt(strength) * prior]), rcond=None)[0]


def within_one_error(above):
    return above.mean() <= above.std(ddof=1) / len(above) ** 0.5


@pytest.mark.parametrize("noise", [0.1, 3.0, 8.0])
def test_weights_are_those_of_the_best_ridge_regression(noise):
    rng = np.random.default_rng(3)
    predicted = rng.normal(size=(4, SUBSETS, M))
    actual = predicted[0] + 0.5 * predicted[1] + noise * rng.normal(size=(SUBSETS, M))
    usual, ridges = np.full(4, 0.25), (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e6)
    fold = np.arange(SUBSETS) % 5
    errors = []
    for ridge in ridges:
        error = np.zeros(SUBSETS)
        for left_out in range(5):
            seen, unseen = fold != left_out, fold == left_out
            weights = ridge_by_numpy(predicted[:, seen], actual[seen], usual, ridge)
            found = np.einsum("c,csm->sm", weights, predicted[:, unseen] - predicted[:, seen].mean(1, keepdims=True))
            error[unseen] = ((actual[unseen] - actual[seen].mean(0) - found) ** 2).sum(1)
        errors.append(error)
    best = min(errors, key=np.sum)
    within = [ridge for ridge, error in zip(ridges, errors, strict=True) if within_one_error(error - best)]
    expected = ridge_by_numpy(predicted, actual, usual, max(within))
    found = fit_weights(*(torch.from_numpy(array).float() for array in (predicted, actual, usual)))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_kind_that_does_not_vary_keeps_its_usual_weight():
    predicted = torch.zeros(2, SUBSETS, M)
    predicted[0] = torch.randn(SUBSETS, M, generator=torch.Generator().manual_seed(0))
    weights = fit_weights(predicted, 2 * predicted[0], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(weights, torch.tensor([2.0, 2.0]), rtol=0.05, atol=0)


def test_what_cannot_be_calibrated():
    predicted = torch.randn(1, SUBSETS, M, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="at least 4 retrained subsets, got 3"):
        fit_weights(predicted[:, :3], predicted[0, :3], torch.ones(1))
    with pytest.raises(ValueError, match="do not predict the outputs of the retrained models"):
        fit_weights(torch.zeros(2, SUBSETS, M), predicted[0], torch.ones(2))
    assert fit_weights(predicted, predicted[0].double(), torch.ones(1)).item() == pytest.approx(1)
    for actual in (-predicted[0], torch.zeros(SUBSETS, M)):
        with pytest.raises(ValueError, match="do not predict the outputs of the retrained models"):
            fit_weights(predicted, actual, torch.ones(1))


def predictions(scores):
    return MASKS.float() @ scores / MASKS.float().mean(1, keepdim=True)


def test_kinds_of_projected_features_are_dampings():
    train = TrainFeatures(X, W, W)
    estimator = Estimator([train], Options(damping=0.4, temperature=1))
    kinds = Kinds(estimator, train, TARGETS, estimator.accumulate(train), [])
    scores = [Estimator([train], Options(damping=value, temperature=1))([TARGETS]).mean for value in (0.4, 0.1, 1.6)]
    torch.testing.assert_close(kinds.predictions(MASKS), torch.stack([predictions(one) for one in scores]))
    found = estimator.scores([kinds.combined(torch.tensor([0.5, -1.0, 2.0]))]).mean
    torch.testing.assert_close(found, 0.5 * scores[0] - scores[1] + 2 * scores[2])
    torch.testing.assert_close(estimator.scores([kinds.combined(torch.tensor(kinds.usual))]).mean, scores[0])


def test_kinds_of_whitened_features_are_layers():
    train = TrainFeatures(Sparse(X), W, W, squares=(X**2).sum(1))
    estimator = Estimator([train], Options(temperature=1))
    kinds = Kinds(estimator, train, sparse(TARGETS), None, [slice(0, 4), slice(4, K)])
    scores = [torch.from_numpy(X[:, own] * W[:, None] / N) @ TARGETS[:, own].T for own in kinds.layers]
    torch.testing.assert_close(kinds.predictions(MASKS), torch.stack([predictions(one) for one in scores]))
    found = estimator.scores([kinds.combined(torch.tensor([2.0, -3.0]))]).mean
    torch.testing.assert_close(found, 2 * scores[0] - 3 * scores[1])
    assert kinds.usual == [1, 1]


def test_features_whitened_by_the_rest_have_one_kind():
    train = TrainFeatures(Sparse(X), W, W, squares=(X**2).sum(1), whitened_by_rest=True)
    estimator = Estimator([train], Options(temperature=1))
    kinds, scores = Kinds(estimator, train, sparse(TARGETS), None, []), estimator([sparse(TARGETS)]).mean
    torch.testing.assert_close(kinds.predictions(MASKS), predictions(scores)[None])
    torch.testing.assert_close(estimator.scores([kinds.combined(torch.tensor([3.0]))]).mean, 3 * scores)
