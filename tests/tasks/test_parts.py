"""The base of outputs of many parts: f, L, Q and the weight in H against loops over parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_trak.tasks.parts import ClassifiedPartsMixin, PartsMixin


class Counts(PartsMixin, nn.Linear):
    """Three counts for each example, negative ones unknown, with the Poisson loss."""

    def part_losses(self, predictions, labels):
        losses = F.poisson_nll_loss(predictions, labels, full=True, reduction="none")
        return losses.where(labels >= 0, torch.zeros_like(losses))

    def count_parts(self, labels):
        return (labels >= 0).sum(1)


X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([[0, 4, 1], [2, -1, 0], [-1, -1, 3], [-1, -1, -1]])


def test_parts_by_a_loop():
    torch.manual_seed(1)
    model = Counts(5, 3).double()
    output = model.model_output((X, Y))
    losses, weight = model.output_to_loss(output, (X, Y)), model.kernel_weight(output.detach(), (X, Y))
    for row, (x, labels) in enumerate(zip(X, Y.tolist(), strict=True)):
        rates, total, n = model(x), 0.0, 0
        for rate, label in zip(rates.tolist(), labels, strict=True):
            if label >= 0:
                stirling = label * math.log(label) - label + 0.5 * math.log(2 * math.pi * label) if label > 1 else 0
                total, n = total + math.exp(rate) - rate * label + stirling, n + 1
        loss = total / max(n, 1)
        assert losses[row].item() == pytest.approx(loss, abs=1e-6)
        p = math.exp(-loss)
        if n:
            assert output[row].item() == pytest.approx(math.log(p / (1 - p)))
        assert weight[row].item() == pytest.approx(n * p * (1 - p), abs=1e-6)


def test_the_gradient_of_the_loss_follows_from_the_output():
    model = Counts(5, 3).double()
    output = model.model_output((X[:3], Y[:3]))
    loss = model.part_losses(model(X[:3]), Y[:3]).sum(1) / torch.tensor([3, 2, 1])
    expected = torch.autograd.grad(loss.sum(), model.weight, retain_graph=True)[0]
    q = model.out_to_loss_grad((X[:3], Y[:3]))
    torch.testing.assert_close(torch.autograd.grad(-(q * output).sum(), model.weight)[0], expected)


def test_all_parts_count_by_default():
    labels = torch.zeros(2, 3, 4)
    assert PartsMixin().count_parts(labels).tolist() == [12, 12]
    assert PartsMixin().count_parts(torch.zeros(2)).tolist() == [1, 1]
    assert PartsMixin().count_parts(torch.zeros(0, 3)).shape == (0,)


class Tokens(ClassifiedPartsMixin, nn.Module):
    ignore_index = 9

    def __init__(self):
        super().__init__()
        self.net = nn.Embedding(5, 3).double()

    def forward(self, x):
        return self.net(x).transpose(1, 2)


def test_classified_parts_by_a_loop():
    model, x = Tokens(), torch.arange(8).reshape(2, 4) % 5
    labels = torch.tensor([[0, 2, 9, 1], [9, 9, 9, 0]])
    output = model.model_output((x, labels))
    losses = [
        [-model.net(x[i, t]).log_softmax(0)[labels[i, t]] for t in range(4) if labels[i, t] != 9] for i in range(2)
    ]
    means = torch.stack([torch.stack(row).mean() for row in losses])
    torch.testing.assert_close(model.output_to_loss(output, (x, labels)), means)
    whole = torch.stack([loss for row in losses for loss in row]).mean()
    torch.testing.assert_close(model.reduce_losses(means, (x, labels)), whole)
    p = torch.exp(-means)
    torch.testing.assert_close(model.kernel_weight(output.detach(), (x, labels)), torch.tensor([3, 1]) * p * (1 - p))


def test_losses_that_are_missing_are_named():
    Model = type("Model", (PartsMixin, nn.Linear), {})
    with pytest.raises(NotImplementedError, match=r"Model must define part_losses\(self, predictions, labels\)"):
        Model(5, 3).double().model_output((X, Y))
