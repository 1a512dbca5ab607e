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


CHOSEN = [0, 5, 10, 14, 19]  # of 20, evenly spaced


def inverse_with_own_part(i, weight):
    """(H / n)⁻¹ from the chosen examples but i, and that with a weight of its own."""
    parts = np.zeros(N)
    parts[CHOSEN] = WEIGHTS.astype("f8")[CHOSEN] / len(CHOSEN)
    parts[i] = weight
    return inverse(parts)


@KINDS
def test_of_many_examples_some_stand_for_all_but_not_for_themselves(kind, targets):
    """Each example has its own part w φ φᵀ / n in H, as often as once; the others are those of the chosen ones."""
    own = OutputCurvature(train(kind), largest=5).own_part()
    expected = [FEATURES[i] @ inverse_with_own_part(i, WEIGHTS[i] / N) @ FEATURES[i] for i in range(N)]
    np.testing.assert_allclose(own, expected, rtol=1e-4)


@KINDS
@pytest.mark.parametrize("m", [M, 6])  # fewer and more than are chosen
def test_scores_have_own_parts_by_the_formula_of_sherman_and_morrison(kind, targets, m):
    """Of examples that are not chosen, φᵀ H⁻¹ φ is in proportion to ‖φ‖², as of the chosen ones on average."""
    chosen_targets = torch.cat([TARGETS, TARGETS])[:m]
    curvature = OutputCurvature(train(kind), largest=5)
    solved = curvature.solve(chosen_targets if kind is not Sparse else sparse(chosen_targets))
    found = solved.products(torch.from_numpy(FEATURES) if kind is not Sparse else sparse(FEATURES))
    found = found * curvature.factor()[:, None]
    without = [FEATURES[i] @ inverse_with_own_part(i, 0) @ FEATURES[i] for i in CHOSEN]
    ratio = sum(without) / (FEATURES[CHOSEN].astype("f8") ** 2).sum()
    for i in range(N):
        if i in CHOSEN:
            expected = FEATURES[i] @ inverse_with_own_part(i, WEIGHTS[i] / N) @ chosen_targets.numpy().T
        else:
            leverage = ratio * (FEATURES[i] ** 2).sum()
            plain = FEATURES[i] @ inverse_with_own_part(i, 0) @ chosen_targets.numpy().T
            expected = plain / (1 + WEIGHTS[i] / N * leverage)
        np.testing.assert_allclose(found[i], expected, rtol=2e-3, atol=1e-4)


def test_without_damping_curvature_may_be_too_large():
    features = (1e6 * RNG.normal(size=(N, 3))).astype("f4")
    one = TrainFeatures(features, LOSS_GRADS, WEIGHTS, squares=(features**2).sum(1), whitened_by_rest=True)
    with pytest.raises(ValueError, match="so much larger than the damping .* set a larger one"):
        OutputCurvature(one)


def test_nothing_is_put_right_where_all_are_in_the_matrix():
    assert OutputCurvature(train(), largest=N).factor() is None


def test_examples_without_features_have_no_scores():
    one = TrainFeatures(np.zeros((6, 3), "f4"), np.ones(6, "f4"), np.ones(6, "f4"), squares=np.zeros(6, "f4"))
    assert OutputCurvature(one, largest=2).factor().tolist() == [1] * 6


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
