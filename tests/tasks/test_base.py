"""Mixins: f, L, Q and w of every task against autograd of its real loss in float64."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_trak import ClassificationMixin, RegressionMixin, TRAKMixin
from lightning_trak.tasks.base import loss_derivatives
from lightning_trak.tasks.loss_terms import LossTerms


class Classifier(ClassificationMixin, nn.Module):
    def __init__(self, classes=3, temperature=1.0):
        super().__init__()
        self.net, self.temperature = nn.Linear(4, classes).double(), temperature

    def forward(self, x):
        return self.net(x)


class Regressor(RegressionMixin, nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.net = nn.Linear(4, outputs).double()

    def forward(self, x):
        return self.net(x)


def batch_of(n=5, classes=3):
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(0, classes, (n,))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.integers(1, 6), st.sampled_from([0.5, 1.0, 3.0]))
def test_classification_is_cross_entropy(classes, n, temperature):
    model, batch = Classifier(classes, temperature), batch_of(n, classes)
    logits = model(batch[0]) / temperature
    p = logits.softmax(1).gather(1, batch[1][:, None])[:, 0]
    output = model.model_output(batch)
    torch.testing.assert_close(output, torch.log(p / (1 - p)))
    torch.testing.assert_close(model.output_to_loss(output, batch), F.cross_entropy(logits, batch[1], reduction="none"))
    torch.testing.assert_close(model.out_to_loss_grad(batch), (1 - p).detach())
    torch.testing.assert_close(model.out_to_loss_curvature(batch), (p * (1 - p)).detach())


@pytest.mark.parametrize("outputs", ["column", "flat"])
def test_regression_is_squared_error(outputs):
    model, (x, _) = Regressor(), batch_of()
    y = torch.randn(5, dtype=torch.float64)
    batch = (x, y[:, None] if outputs == "column" else y)
    f = model(x)[:, 0]
    torch.testing.assert_close(model.model_output(batch), f)
    torch.testing.assert_close(model.output_to_loss(f, batch), F.mse_loss(f, y, reduction="none"))
    torch.testing.assert_close(model.out_to_loss_grad(batch), (2 * (y - f)).detach())
    torch.testing.assert_close(model.out_to_loss_curvature(batch), torch.full((5,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("form", [dict, UserDict])
def test_mappings_and_objects_with_logits(form):
    x, y = batch_of()

    class HuggingFaceLike(Classifier):
        def forward(self, inputs, scale=1.0):
            return SimpleNamespace(logits=self.net(inputs) * scale, loss=None)

    class DictLike(Classifier):
        def forward(self, inputs):
            return {"logits": self.net(inputs)}

    expected = Classifier()
    for kind in (HuggingFaceLike, DictLike):
        model = kind()
        model.load_state_dict(expected.state_dict())
        batch = form({"inputs": x, "labels": y})
        torch.testing.assert_close(model.model_output(batch), expected.model_output((x, y)))


def test_hooks_for_other_batches():
    class Own(Classifier):
        def get_logits(self, batch):
            return self(batch.x)

        def get_labels(self, batch):
            return batch.one_hot.argmax(1)

    x, y = batch_of()
    model = Own()
    batch = SimpleNamespace(x=x, one_hot=F.one_hot(y, 3))
    reference = Classifier()
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.model_output(batch), reference.model_output((x, y)))


@pytest.mark.parametrize(
    ("model", "batch", "error", "message"),
    [
        (Classifier(), SimpleNamespace(x=1), TypeError, r"batch is SimpleNamespace.*Override get_logits"),
        (Classifier(), (torch.zeros(2, 4).double(), "labels"), TypeError, r"str\).*Override get_labels"),
        (Classifier(), {"inputs": 1}, TypeError, r"forward cannot be called with .* Override get_logits"),
        (Classifier(1), (torch.zeros(2, 4).double(), torch.full((2,), 0.5)), ValueError, "other than 0 and 1"),
        (Classifier(), (torch.zeros(2, 4).double(), torch.zeros(2)), ValueError, "integer class labels"),
        (Classifier(), (torch.zeros(2, 4).double(), torch.zeros(2, 3).long()), ValueError, "integer class labels"),
        (
            Regressor(2),
            (torch.zeros(2, 4).double(), torch.zeros(2)),
            ValueError,
            r"predictions \(2, 2\).*get_predictions",
        ),
    ],
)
def test_batches_of_a_wrong_form(model, batch, error, message):
    with pytest.raises(error, match=message):
        model.model_output(batch)


def test_defaults_of_the_mixin():
    class Logistic(TRAKMixin, nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.randn(4, dtype=torch.float64))

        def model_output(self, batch):
            return batch @ self.theta

    model, x = Logistic(), torch.randn(5, 4, dtype=torch.float64)
    p = torch.sigmoid(x @ model.theta).detach()
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(model.out_to_loss_grad(x), 1 - p)
            torch.testing.assert_close(model.out_to_loss_curvature(x), p * (1 - p))
    with pytest.raises(NotImplementedError, match="must define model_output"):
        TRAKMixin().model_output(x)


def test_loss_derivatives_of_odd_losses():
    f = torch.randn(3, dtype=torch.float64)
    grad, curvature = loss_derivatives(lambda output: -2 * output, f)
    assert torch.equal(grad, torch.full((3,), 2.0).double())
    assert torch.equal(curvature, torch.zeros(3).double())
    grad, curvature = loss_derivatives(lambda output: output**4, f)
    torch.testing.assert_close((grad, curvature), (-4 * f**3, 12 * f**2))
    with pytest.raises(ValueError, match=r"returned shape \(\).*reduction='none'"):
        loss_derivatives(lambda output: output.mean(), f)
    with pytest.raises(ValueError, match="does not depend on output"):
        loss_derivatives(lambda output: torch.zeros(3), f)


def terms(module, batch):
    return LossTerms(module)(lambda method, *args: method(*args), batch, module.model_output(batch).detach())


def test_loss_terms_use_what_the_module_defines():
    class Bare(nn.Module):
        def model_output(self, batch):
            return batch

    f = torch.randn(4)
    p = torch.sigmoid(f)
    torch.testing.assert_close(terms(Bare(), f), (1 - p, p * (1 - p)))

    class OwnLoss(Bare):
        def output_to_loss(self, output, batch):
            return (output - 1) ** 2

    torch.testing.assert_close(terms(OwnLoss(), f), (-2 * (f - 1), torch.full((4,), 2.0)))

    class OwnGrad(Bare, TRAKMixin):
        def out_to_loss_grad(self, batch):
            return 1 - torch.sigmoid(batch)

    torch.testing.assert_close(terms(OwnGrad(), f), (1 - p, p * (1 - p)))

    class Inconsistent(Bare):
        def out_to_loss_grad(self, batch):
            return 1 - batch

    with pytest.raises(ValueError, match="belong to different losses.*output_to_loss"):
        terms(Inconsistent(), f)

    class OwnBoth(Inconsistent):
        def out_to_loss_curvature(self, batch):
            return torch.ones_like(batch)

    torch.testing.assert_close(terms(OwnBoth(), f), (1 - f, torch.ones(4)))

    class Misshapen(Bare):
        def out_to_loss_grad(self, batch):
            return batch.mean()

    with pytest.raises(ValueError, match=r"out_to_loss_grad\(batch\) returned shape \(\)"):
        terms(Misshapen(), f)


def test_no_second_forward_pass_where_none_is_needed():
    calls = []

    class Counted(Classifier):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    module, batch = Counted(), batch_of()
    output = module.model_output(batch).detach()
    calls.clear()
    LossTerms(module)(lambda method, *args: method(*args), batch, output)
    assert calls == []
