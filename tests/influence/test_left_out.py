"""Leaving out sets of examples, against training again without them, and against (p, p) matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trak.influence import Estimator, Options, OutputCurvature, TrainFeatures
from lightning_trak.influence.left_out import LeftOut
from tests.influence.sparse import Sparse, sparse

N, M, K = 40, 5, 6
RNG = np.random.default_rng(0)
X, TARGETS = RNG.normal(size=(N, K)).astype("f4"), RNG.normal(size=(M, K)).astype("f4")
SETS = [[3], list(range(10)), list(range(0, N, 2)), [5, 39]]
MASKS = torch.stack([torch.zeros(N, dtype=torch.bool).index_fill(0, torch.tensor(one), True) for one in SETS])


def fit(x, y, ridge):
    """Ridge regression, in float64."""
    x = x.astype("f8")
    return np.linalg.solve(x.T @ x + ridge * np.eye(K), x.T @ y)


@pytest.mark.parametrize("damping", [0, 0.5])
def test_a_quadratic_loss_is_trained_again_exactly(damping):
    """Where training with weight decay has converged, the step is what training again without the set gives."""
    X[1:10] = X[0] + 0.01 * X[1:10]  # duplicates: sums of scores fail
    y = X @ RNG.normal(size=K) + RNG.normal(size=N)
    ridge = damping * (X.astype("f8") ** 2).sum() / K
    trained = fit(X, y, ridge)
    train = TrainFeatures(X, (y - X @ trained).astype("f4"), np.ones(N, "f4"))
    estimator = Estimator([train], Options(damping=damping))
    found = estimator.without(train, torch.from_numpy(TARGETS), MASKS)
    for own, mask in zip(found, MASKS.numpy(), strict=True):
        expected = TARGETS @ (fit(X[~mask], y[~mask], ridge) - trained)
        np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-4)
    sums = -(MASKS.float() @ estimator([torch.from_numpy(TARGETS)]).mean)
    assert (sums - found)[1].abs().max() > 0.1 * found[1].abs().max()


@pytest.mark.parametrize("curvature", [True, False])
def test_the_step_is_that_of_the_rest(curvature):
    w = RNG.uniform(0.1, 0.9, size=N).astype("f4")
    train = TrainFeatures(X, w, w)
    estimator = Estimator([train], Options(damping=0.3, curvature=curvature, temperature=1))
    found = estimator.without(train, torch.from_numpy(TARGETS), MASKS)
    weights, x = (w if curvature else np.ones(N)).astype("f8"), X.astype("f8")
    whole = x.T @ (weights[:, None] * x)
    for own, mask in zip(found, MASKS.numpy(), strict=True):
        rest = x[~mask].T @ (weights[~mask, None] * x[~mask]) + 0.3 * np.trace(whole) / K * np.eye(K)
        expected = -TARGETS @ np.linalg.solve(rest, x[mask].T @ w[mask])
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-6)


def whitened(kind, w, **options):
    return TrainFeatures(kind(X), w, w, squares=(X**2).sum(1), **options)


KINDS = pytest.mark.parametrize(
    ("kind", "targets"),
    [(lambda values: values, torch.from_numpy(TARGETS)), (Sparse, sparse(TARGETS))],
    ids=["dense", "sparse"],
)


@KINDS
def test_whitened_by_what_the_outputs_leave_open(kind, targets):
    w = RNG.uniform(0.1, 0.9, size=N).astype("f4")
    train = whitened(kind, w, whitened_by_rest=True)
    found = Estimator([train], Options(temperature=1)).without(train, targets, MASKS)
    x = X.astype("f8")
    for own, mask in zip(found, MASKS.numpy(), strict=True):
        rest = (~mask).sum() * np.eye(K) + x[~mask].T @ (w[~mask, None] * x[~mask])
        np.testing.assert_allclose(own, -TARGETS @ np.linalg.solve(rest, x[mask].T @ w[mask]), rtol=1e-3, atol=1e-5)


def test_of_many_examples_some_stand_for_the_rest():
    w = RNG.uniform(0.1, 0.9, size=N).astype("f4")
    train, chosen = whitened(lambda values: values, w, whitened_by_rest=True), [0, 10, 20, 29, 39]
    curvature = OutputCurvature(train, largest=5)
    found = curvature.without(torch.from_numpy(TARGETS), LeftOut.of(train, MASKS))
    x = X.astype("f8")
    for own, mask in zip(found, MASKS.numpy(), strict=True):
        rest = (~mask).sum() * np.eye(K)
        for i in chosen:
            rest += 0 if mask[i] else N / 5 * w[i] * np.outer(x[i], x[i])
        np.testing.assert_allclose(own, -TARGETS @ np.linalg.solve(rest, x[mask].T @ w[mask]), rtol=1e-3, atol=1e-5)


@KINDS
def test_whitened_by_the_whole_curvature(kind, targets):
    q = RNG.uniform(0.1, 0.9, size=N).astype("f4")
    train = whitened(kind, q)
    found = Estimator([train], Options(temperature=1)).without(train, targets, MASKS)
    for own, mask in zip(found, MASKS.numpy(), strict=True):
        expected = -TARGETS.astype("f8") @ X[mask].T.astype("f8") @ q[mask] / (~mask).sum()
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-6)


def test_a_rest_that_is_too_small_is_an_error():
    train = TrainFeatures(X, np.ones(N, "f4"), np.ones(N, "f4"))
    rest = torch.ones(1, N, dtype=torch.bool)
    rest[0, :3] = False  # three examples for six features
    with pytest.raises(ValueError, match="H is singular: too few examples are left"):
        Estimator([train], Options(damping=0)).without(train, torch.from_numpy(TARGETS), rest)
