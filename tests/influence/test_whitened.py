"""Scores of whitened features, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trak.influence import Estimator, Options, TrainFeatures
from tests.influence.sparse import Sparse, sparse

N, M, P = 12, 4, 30
RNG = np.random.default_rng(0)
FEATURES = [RNG.normal(size=(N, P)).astype("f4") for _ in range(2)]
TARGETS = [torch.from_numpy(RNG.normal(size=(M, P)).astype("f4")) for _ in range(2)]
LOSS_GRADS = [RNG.uniform(size=N).astype("f4") for _ in range(2)]


SPARSE_TARGETS = [sparse(target) for target in TARGETS]


def whitened(kind=lambda values: values):
    squares = [(values**2).sum(1) for values in FEATURES]
    return [
        TrainFeatures(kind(values), q.copy(), q * (1 - q), squares=two, logistic=True, n_trainable=1000)
        for values, q, two in zip(FEATURES, LOSS_GRADS, squares, strict=True)
    ]


def expected(loss_grads=LOSS_GRADS):
    terms = zip(FEATURES, TARGETS, loss_grads, strict=True)
    return np.mean([(phi @ z.numpy().T) * q[:, None] / N for phi, z, q in terms], 0)


@pytest.mark.parametrize(
    ("kind", "targets"), [(lambda values: values, TARGETS), (Sparse, SPARSE_TARGETS)], ids=["dense", "sparse"]
)
def test_scores_are_inner_products(kind, targets):
    found = Estimator(whitened(kind))(targets)
    np.testing.assert_allclose(found.mean, expected(), rtol=1e-4, atol=1e-6)
    assert found.spread.sample.shape == (2, N, M)


def test_extremes_are_those_of_the_scores():
    estimator = Estimator(whitened(Sparse))
    solved = [estimator.solve(train, z) for train, z in zip(estimator.trains, SPARSE_TARGETS, strict=True)]
    top = estimator.extremes(solved, 3).top
    np.testing.assert_array_equal(top.indices, np.argsort(-expected(), 0)[:3].T)


def test_self_influence_is_that_of_all_entries():
    """Not of those alone that were kept."""
    train = whitened(Sparse)[0]
    found = Estimator([train]).self_influence(train)
    np.testing.assert_allclose(found, LOSS_GRADS[0] ** 2 * (FEATURES[0] ** 2).sum(1) / N, rtol=1e-5)


def test_outputs_are_not_temperature_scaled_by_default():
    assert Estimator(whitened()).temperature == 1
    cooler = Estimator(whitened(), Options(temperature=2.0))(TARGETS)
    softened = [1 / (1 + np.exp(-np.log(q / (1 - q)) / 2)) / 2 for q in LOSS_GRADS]
    np.testing.assert_allclose(cooler.mean, expected(softened), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("given", "value"), [("auto", 1.0), (0.3, 0.3)])
def test_damping_is_told(given, value):
    estimator = Estimator(whitened(), Options(damping=given))
    damping = estimator.solve(estimator.trains[0], TARGETS[0]).damping
    assert damping == (value, "relative to each parameter's mean eigenvalue")
