"""Q and w of outputs that are divided by a temperature: against autograd of the loss itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from lightning_trak.influence import TrainFeatures
from lightning_trak.influence.temperature import is_logistic, tempered


def train_set(loss_grad, curvature):
    return TrainFeatures(np.zeros((len(loss_grad), 2), "f4"), loss_grad, curvature)


def derivatives(loss, output):
    """Q and w in float64, by autograd; rounded as the store does."""
    output = output.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(output).sum(), output, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), output)
    return (-slope).detach().float().numpy(), curvature.float().numpy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3, 4.0])
def test_against_autograd_of_the_loss_of_divided_outputs(temperature):
    output = torch.linspace(-12, 40, 200, dtype=torch.float64)
    train = train_set(*derivatives(lambda f: softplus(-f, threshold=100), output))
    assert is_logistic(output, torch.from_numpy(train.loss_grad), torch.from_numpy(train.curvature))
    got = tempered(train, temperature)
    q, w = derivatives(lambda f: softplus(-f / temperature, threshold=100), output)
    np.testing.assert_allclose(got.loss_grad, q, rtol=2e-2 if temperature < 1 else 1e-2)  # Q near 1 is rounded
    np.testing.assert_allclose(got.curvature, w, rtol=5e-2, atol=1e-7)
    assert got.features is train.features


def test_outputs_beyond_what_float32_holds_stay_finite():
    q = np.array([0.0, 1e-45, 1.0], "f4")
    got = tempered(train_set(q, q * 0), 1.3)
    np.testing.assert_array_equal(got.loss_grad[[0, 2]], np.array([0, 1 / 1.3], "f4"))
    assert np.isfinite(got.loss_grad).all()
    assert np.isfinite(got.curvature).all()


def smoothed(f):
    return 0.9 * softplus(-f) + 0.1 * softplus(f)


def mirrored(f):
    """Another loss with Q and w that fit together: those of softplus(f) with the sign of Q turned."""
    return softplus(f)


LOSSES = [
    lambda f: (f - 1).square(),
    smoothed,
    lambda f: 3 * softplus(-f),
    torch.exp,
    lambda f: softplus(-f + 1),
    mirrored,
]


@pytest.mark.parametrize("loss", LOSSES)
def test_other_losses_are_told_from_the_logistic_one(loss):
    output = torch.linspace(-3, 3, 20, dtype=torch.float64)
    assert not is_logistic(output, *(torch.from_numpy(array) for array in derivatives(loss, output)))
