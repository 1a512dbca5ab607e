"""The damping: that of cross-validation against leaving examples out one by one; that of training by its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trak.influence import TrainFeatures, TrainingTime
from lightning_trak.influence.damping import (
    CANDIDATES,
    between,
    choose_damping,
    distance_to_optimum,
    training_damping,
)
from lightning_trak.influence.gauss_newton import accumulate


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
            relative = np.array(errors) / min(errors) - 1
            near = np.exp(-relative / 0.005)
            expected = np.exp(near @ np.log(CANDIDATES) / near.sum())
            assert choose_damping(*tensors(features, loss_grad, weights), scale) == pytest.approx(expected, rel=0.02)
            chosen.add(CANDIDATES[int(np.argmin(errors))])
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
    assert choose_damping(*tensors(*more), scale) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("noise", [1, 10, 20, 50])
def test_a_sample_of_a_large_train_set_decides_as_the_whole_does(noise):
    rng = np.random.default_rng(0)
    features, weights = rng.normal(size=(1500, 200)) * 0.97 ** np.arange(200), rng.uniform(0.05, 1, size=1500)
    response = features @ rng.normal(size=200) + noise / np.sqrt(weights) * rng.normal(size=1500)
    scale = np.mean(np.diag((features.T * weights) @ features))
    arrays = tensors(features, weights * response, weights)
    train = TrainFeatures(*(array.numpy() for array in arrays))
    _, sample = accumulate(train, curvature=True, sample_size=500)
    assert choose_damping(*sample, scale) == pytest.approx(choose_damping(*arrays, scale), rel=0.5)


def test_training_damping_is_the_strength_of_training_relative_to_the_kernel():
    """λ·mean(diag H) = n (1 / (t / 4) + weight decay), of the longest time."""
    trainings = [TrainingTime(2.0, 5, 0.5), TrainingTime(8.0, 20, 0.5)]
    assert training_damping(trainings, n_train=30, scale=5.0) * 5.0 == pytest.approx(30 * (1 / 2 + 0.5))


def test_training_damping_is_never_so_small_that_nothing_can_be_solved():
    assert training_damping([TrainingTime(1e9)], n_train=30, scale=5.0) == 1e-3


def test_an_optimum_is_where_gradients_add_up_to_nothing():
    features, loss_grad, _ = problem(1.0)
    residual = loss_grad - features @ np.linalg.lstsq(features, loss_grad, rcond=None)[0]
    for q, expected in ((loss_grad, 1), (residual, 0), (residual + 0.001 * loss_grad, 0)):
        squares = sum(q_i**2 * x @ x for q_i, x in zip(q, features, strict=True))
        assert distance_to_optimum(torch.tensor(features.T @ q), squares) == expected
    assert distance_to_optimum(torch.zeros(2), 0.0) == 0


@pytest.mark.parametrize("start", [1e-6, 1.0])
def test_no_rule_jumps(start):
    """Along a path of models, λ changes step by step: towards an optimum, and from one best candidate to another."""
    features, loss_grad, weights = problem(3.0, n=60)
    residual = loss_grad - features @ np.linalg.lstsq(features, loss_grad, rcond=None)[0]
    other = problem(0.1, n=60, seed=5)[1]
    ends = (residual, residual + loss_grad) if start < 1 else (loss_grad, other)
    dampings, nearest = [], set()
    for part in np.geomspace(start, 1, 400) if start < 1 else np.linspace(0, 1, 400):
        q = (1 - part) * ends[0] + part * ends[1]
        arrays = tensors(features, q, weights)
        scale = np.mean(np.diag((features.T * weights) @ features))
        gradient, squares = torch.tensor(features.T @ q), float(sum(q**2 * (features**2).sum(1)))
        distance = distance_to_optimum(gradient, squares)
        dampings.append(between(1e-3, choose_damping(*arrays, scale), distance))
        nearest.add(min(CANDIDATES, key=lambda candidate: abs(np.log(candidate / dampings[-1]))))
    steps = np.abs(np.diff(np.log(dampings)))
    assert np.ptp(np.log(dampings)) > 1  # it does change
    assert steps.max() < 0.3
    assert start < 1 or len(nearest) > 1
