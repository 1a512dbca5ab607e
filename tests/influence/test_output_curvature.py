"""The curvature of outputs beside whitened features, against the (p, p) matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trak.influence import Estimator, Options, OutputCurvature, TrainFeatures, TrainingTime
from tests.influence.sparse import Sparse, sparse

N, M, P = 20, 4, 30
RNG = np.random.default_rng(0)
FEATURES = (2 * RNG.normal(size=(N, P))).astype("f4")
TARGETS = torch.from_numpy(RNG.normal(size=(M, P)).astype("f4"))
LOSS_GRADS = RNG.uniform(0.1, 0.9, size=N).astype("f4")
WEIGHTS = LOSS_GRADS * (1 - LOSS_GRADS)


def train(kind=lambda values: values, loss_grad=LOSS_GRADS, weights=WEIGHTS, **options):
    squares = (FEATURES**2).sum(1)
    return TrainFeatures(
        kind(FEATURES), loss_grad, weights, squares=squares, whitened_by_rest=True, n_trainable=1000, **options
    )


def inverse(weights, features=FEATURES):
    """(I + Σᵢ wᵢ φᵢ φᵢᵀ)⁻¹ in float64; w has the division by n."""
    features = features.astype("f8")
    return np.linalg.inv(np.eye(P) + features.T @ (weights[:, None] * features))


KINDS = pytest.mark.parametrize(
    ("kind", "targets"), [(lambda values: values, TARGETS), (Sparse, sparse(TARGETS))], ids=["dense", "sparse"]
)


@KINDS
def test_scores_are_those_of_the_newton_step(kind, targets):
    found = Estimator([train(kind)], Options(temperature=1))([targets]).mean
    expected = FEATURES @ inverse(WEIGHTS / N) @ TARGETS.numpy().T * LOSS_GRADS[:, None] / N
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


@KINDS
def test_of_many_examples_some_stand_for_all_but_not_for_themselves(kind, targets):
    """Each example has its own part w φ φᵀ / n in H, as often as once; the others are those of the chosen ones."""
    chosen, weights = [0, 5, 10, 14, 19], WEIGHTS.astype("f8")
    curvature = OutputCurvature(train(kind), largest=5)
    own, factor = curvature.own_part()
    found = curvature.solve(targets).products(torch.from_numpy(FEATURES) if kind is not Sparse else sparse(FEATURES))
    for i in range(N):
        parts = np.zeros(N)
        parts[chosen] = weights[chosen] / 5
        parts[i] = weights[i] / N
        solved = inverse(parts)
        np.testing.assert_allclose(own[i], FEATURES[i] @ solved @ FEATURES[i], rtol=1e-4)
        np.testing.assert_allclose(found[i] * factor[i], FEATURES[i] @ solved @ TARGETS.numpy().T, rtol=2e-3, atol=1e-4)


def test_the_estimator_puts_the_own_part_right():
    """Of 4100 examples, 4096 stand for all: with two entries, H is known in closed form."""
    n = 4100
    features = RNG.normal(size=(n, 2)).astype("f4")
    loss_grad = RNG.uniform(0.1, 0.9, size=n).astype("f4")
    one = TrainFeatures(features, loss_grad, loss_grad, squares=(features**2).sum(1), whitened_by_rest=True)
    found = Estimator([one], Options(temperature=1))([torch.eye(2)]).mean
    double = features.astype("f8")
    inverse = np.linalg.inv(np.eye(2) + double.T @ (loss_grad[:, None] * double) / n)
    np.testing.assert_allclose(found, double @ inverse * loss_grad[:, None] / n, rtol=1e-2, atol=1e-6)


@KINDS
def test_self_influence_is_the_score_of_an_example_for_its_own_loss(kind, targets):
    one = train(kind)
    found = Estimator([one], Options(temperature=1)).self_influence(one)
    expected = LOSS_GRADS**2 * np.einsum("ip,pq,iq->i", FEATURES, inverse(WEIGHTS / N), FEATURES) / N
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_extremes_are_those_of_the_scores():
    estimator = Estimator([train(Sparse), train(Sparse)])
    solved = [estimator.solve(one, sparse(TARGETS)) for one in estimator.trains]
    whole = estimator.scores(solved).mean
    assert torch.equal(estimator.extremes(solved, 3).top.indices, whole.topk(3, 0).indices.T)


def test_logistic_outputs_are_temperature_scaled():
    assert Estimator([train(logistic=True)]).temperature == 1.3
    assert Estimator([train(logistic=False)]).temperature == 1


@pytest.mark.parametrize("weight", [0.0, -1e-9])
def test_outputs_without_curvature_change_nothing(weight):
    found = Estimator([train(weights=np.full(N, weight, "f4"))], Options(temperature=1))([TARGETS]).mean
    np.testing.assert_allclose(found, FEATURES @ TARGETS.numpy().T * LOSS_GRADS[:, None] / N, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("time", "given", "expected"),
    [
        (TrainingTime(time=4.0), "auto", (0.5, "from the training time")),
        (None, "auto", (1.0, "relative to each parameter's mean eigenvalue")),
        (TrainingTime(time=4.0), 0.3, (0.3, "relative to each parameter's mean eigenvalue")),
    ],
)
def test_damping_is_told(time, given, expected):
    estimator = Estimator([train(training_time=time)], Options(damping=given))
    assert estimator.solve(estimator.trains[0], TARGETS).damping == expected
