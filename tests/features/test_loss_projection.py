"""Losses that are no function of the model output: Q by projection against a float64 loop over the examples."""

from __future__ import annotations

from contextlib import nullcontext

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Attribution, ClassificationMixin, FeatureStore, RegressionMixin, TRAKCallback, TRAKMixin
from lightning_trak.features.loss_projection import project_loss, projected_curvature
from lightning_trak.store.files import read_json, write_json
from lightning_trak.store.weights import load_weights

N = 20


def data(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1), x.sum(1))


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.classes, self.number = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return self.classes(hidden), self.number(hidden).squeeze(1)

    def training_step(self, batch, batch_idx):
        return self.per_sample_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(data(), 8, shuffle=True)

    def test_dataloader(self):
        return DataLoader(data(6, seed=1), 6)


class TwoTasks(ClassificationMixin, Module):
    """Learns a class and a number; the class is attributed."""

    def get_logits(self, batch):
        return self(batch[0])[0]

    def per_sample_loss(self, batch):
        x, y, number = batch
        logits, predicted = self(x)
        return F.cross_entropy(logits, y, reduction="none") + 0.02 * (predicted - number).square()


class OneTask(TwoTasks):
    """The loss is a function of the output, after all."""

    def per_sample_loss(self, batch):
        return F.cross_entropy(self.get_logits(batch), batch[1], reduction="none")


class Smoothed(OneTask):
    def per_sample_loss(self, batch):
        return F.cross_entropy(self.get_logits(batch), batch[1], reduction="none", label_smoothing=0.2)


class OwnCurvature(TwoTasks):
    def per_sample_loss(self, batch):
        return super().per_sample_loss(batch) - 10

    def out_to_loss_curvature(self, batch):
        return torch.full((len(batch[0]),), 0.25)


class Unbatchable(TwoTasks):
    """Only the loop can differentiate this loss."""

    def per_sample_loss(self, batch):
        x, y, number = batch
        rows = [F.cross_entropy(self(x[i : i + 1])[0], y[i : i + 1]) for i in range(len(x))]
        return torch.stack(rows) * (2 if x.sum().item() > 1e9 else 1) + 0.02 * (self(x)[1] - number).square()


def run(root, module, max_epochs=1, **options):
    torch.manual_seed(0)
    trainer = L.Trainer(
        default_root_dir=root, max_epochs=max_epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[TRAKCallback(root / "trak", **{"projector": "identity", **options})],
    )  # fmt: skip
    trainer.fit(module)
    return trainer


def slow(module, weights):
    """Return per-sample Q and L, and the part of ‖∇L‖² along ∇f, in float64."""
    module.load_state_dict(weights)
    module = module.double()
    found, losses, along, whole = [], [], 0.0, 0.0
    for x, y, number in data():
        batch = x[None].double(), y[None], number[None].double()
        of_output, of_loss = (
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(value, list(module.parameters()), materialize_grads=True)]
            )
            for value in (module.model_output(batch).sum(), module.per_sample_loss(batch).sum())
        )
        found.append(torch.linalg.lstsq(of_output[:, None], -of_loss).solution.item())
        losses.append(module.per_sample_loss(batch).item())
        along, whole = along + (found[-1] * of_output).square().sum().item(), whole + of_loss.square().sum().item()
    return torch.tensor(found), torch.tensor(losses), along / whole


@pytest.mark.parametrize("kind", [TwoTasks, OneTask, Smoothed, Unbatchable])
@pytest.mark.parametrize("gradients", ["auto", "vmap", "loop"])
def test_against_a_loop(tmp_path, kind, gradients):
    if kind is Unbatchable and gradients == "vmap":
        with pytest.raises(ValueError, match="gradients='vmap' cannot differentiate this model"):
            run(tmp_path, kind(), gradients=gradients)
        return
    module = kind()
    trainer = run(tmp_path, module, gradients=gradients)
    (entry,) = FeatureStore(tmp_path / "trak")
    expected, losses, explained = slow(kind(), load_weights(entry.weights_path, entry.digest))
    loss_grad, curvature = (torch.tensor(value) for value in (entry.loss_grad, entry.curvature))
    torch.testing.assert_close(loss_grad, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(curvature, expected.square() / (2 * losses), rtol=1e-3, atol=1e-4)
    attribution = trainer.attribute()
    assert attribution.info.loss_explained == pytest.approx((explained,), rel=1e-3)
    attribution.save(tmp_path / "saved")
    assert Attribution.load(tmp_path / "saved").info == attribution.info


def test_a_function_of_the_output_is_found_to_be_one(tmp_path):
    """Then Q is that of the formula."""
    trainer = run(tmp_path, OneTask())
    (entry,) = FeatureStore(tmp_path / "trak")
    p = trainer.lightning_module.model_output(data()[:]).sigmoid().detach()
    torch.testing.assert_close(torch.tensor(entry.loss_grad), 1 - p, rtol=1e-3, atol=1e-4)
    assert entry.meta["loss_explained"] == pytest.approx(1, abs=1e-5)


def test_how_good_it_is_is_said_once_a_fit(tmp_path, said):
    trainer = run(tmp_path, Smoothed(), max_epochs=3)
    assert len(FeatureStore(tmp_path / "trak")) == 3
    torch.save(
        {name: value * 0.8 for name, value in trainer.lightning_module.state_dict().items()}, tmp_path / "new.pt"
    )
    trainer.attribute(ckpt_path=tmp_path / "new.pt")  # where Q is found by projection again
    (line,) = [line for line in said() if "by projection" in line]
    assert "Q by projection, gradients by hooks: 9" in line
    assert "% of the gradients of" in line
    assert "\n" not in line


class Lowered(OneTask):
    """Its losses become negative in the second epoch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("lowered", torch.tensor(0.0))

    def on_train_epoch_start(self):
        self.lowered.fill_(-10.0 * (self.current_epoch > 0))

    def per_sample_loss(self, batch):
        return super().per_sample_loss(batch) + self.lowered


def test_what_is_doubtful_of_a_later_checkpoint_is_warned_of_once(tmp_path):
    with pytest.warns(UserWarning, match="per_sample_loss is negative for some examples") as caught:
        run(tmp_path, Lowered(), max_epochs=3)
    assert sum("is negative" in str(warning.message) for warning in caught) == 1


class Elsewhere(TwoTasks):
    def per_sample_loss(self, batch):
        return (self(batch[0])[1] - batch[2]).square()


def test_a_loss_that_the_output_says_little_of_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"Only \d+\.\d% of the gradients of per_sample_loss .* minus its square root"):
        run(tmp_path, Elsewhere())


def test_a_curvature_of_ones_own(tmp_path):
    run(tmp_path, OwnCurvature())  # and so it is no matter that losses are negative
    (entry,) = FeatureStore(tmp_path / "trak")
    assert (entry.curvature == 0.25).all()


class Negative(TwoTasks):
    def per_sample_loss(self, batch):
        return super().per_sample_loss(batch) - 10


def test_negative_losses_have_the_fisher_information_for_curvature(tmp_path):
    with pytest.warns(UserWarning, match="per_sample_loss is negative for some examples"):
        run(tmp_path, Negative())
    (entry,) = FeatureStore(tmp_path / "trak")
    torch.testing.assert_close(torch.tensor(entry.curvature), torch.tensor(entry.loss_grad).square())


class Squared(RegressionMixin, Module):
    """Its loss is that of the mixin, in another unit."""

    unit = 1.0

    def get_predictions(self, batch):
        return self(batch[0])[1]

    def get_labels(self, batch):
        return batch[2]

    def per_sample_loss(self, batch):
        return self.unit * (self.get_predictions(batch) - batch[2]).square()


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_squared_errors_have_the_right_curvature_in_any_unit(tmp_path, unit):
    module = Squared()
    module.unit = unit
    module.training_step = lambda batch, batch_idx: module.per_sample_loss(batch).mean() / unit
    with pytest.warns(UserWarning, match="training_step") if unit != 1 else nullcontext():
        run(tmp_path, module)
    (entry,) = FeatureStore(tmp_path / "trak")
    residuals = data().tensors[2] - module.get_predictions(data()[:]).detach()
    torch.testing.assert_close(torch.tensor(entry.loss_grad), 2 * unit * residuals, rtol=1e-3, atol=1e-3 * unit)
    torch.testing.assert_close(torch.tensor(entry.curvature), torch.full((N,), 2 * unit), rtol=1e-3, atol=0)


def test_what_is_memorised_does_not_count_for_more():
    """Its loss is zero by rounding, while its gradient is not."""
    logits = torch.tensor([[20.0, 0, 0], [17.5, 0, 0], [1.0, 0, 0]])
    losses = F.cross_entropy(logits, torch.zeros(3, dtype=torch.long), reduction="none")
    assert losses[0] == 0
    curvature = projected_curvature(1 - logits.double().softmax(1)[:, 0].float(), losses)
    assert curvature[0] <= curvature[1] < curvature[2]


def test_featurization_that_goes_on_says_nothing_of_the_rest(tmp_path, monkeypatch):
    """Q and w are the same, and how much of the gradients is along the output's is not noted for a part."""
    monkeypatch.setattr("lightning_trak.trainer.featurizing.plan.rows_in_a_chunk", lambda *_: 12)
    trainer = run(tmp_path, TwoTasks())
    (entry,) = FeatureStore(tmp_path / "trak")
    whole = entry.loss_grad.copy()
    entry.train.path(12).unlink()
    meta = read_json(entry.path / "meta.json")
    del meta["loss_explained"]
    write_json(entry.path / "meta.json", meta)
    info = trainer.attribute().info
    (entry,) = FeatureStore(tmp_path / "trak")
    np.testing.assert_allclose(entry.loss_grad, whole, rtol=1e-4)
    assert info.loss_explained == ()


@pytest.mark.parametrize("projector", ["factored", "sparse", "rademacher"])
def test_sketches_do_as_well(tmp_path, projector):
    class Wide(TwoTasks):
        def __init__(self):
            super().__init__()
            self.body, self.classes, self.number = nn.Linear(4, 300), nn.Linear(300, 3), nn.Linear(300, 1)

    run(tmp_path / "exact", Wide())
    run(tmp_path / "sketch", Wide(), projector=projector, proj_dim=512)
    ((exact,), (sketch,)) = (FeatureStore(tmp_path / name / "trak") for name in ("exact", "sketch"))
    assert np.corrcoef(exact.loss_grad, sketch.loss_grad)[0, 1] > 0.99
    assert sketch.meta["loss_explained"] == pytest.approx(exact.meta["loss_explained"], abs=0.1)


class Averaged(TwoTasks):
    def per_sample_loss(self, batch):
        return super().per_sample_loss(batch).mean()


class Batchwise(TwoTasks):
    def per_sample_loss(self, batch):
        losses = super().per_sample_loss(batch)
        return losses + losses.mean()


class NotANumber(TwoTasks):
    def per_sample_loss(self, batch):
        return super().per_sample_loss(batch) * float("nan")


class Detached(TwoTasks):
    def per_sample_loss(self, batch):
        return super().per_sample_loss(batch).detach()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Averaged, r"Averaged\.per_sample_loss\(batch\) returned a tensor of shape \(\)"),
        (Batchwise, r"Batchwise\.per_sample_loss gives .* in a batch, and .* for it alone"),
        (NotANumber, "per_sample_loss is NaN or infinite for train rows 0, 1"),
        (Detached, r"Detached\.per_sample_loss does not depend on any of the 6 attributed"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, kind, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, kind())


class OtherTraining(TwoTasks):
    def training_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)


def test_the_loss_of_training_is_compared(tmp_path):
    with pytest.warns(UserWarning, match=r"training_step returned a loss of .* per_sample_loss"):
        run(tmp_path, OtherTraining())


def test_without_a_gradient_there_is_no_q():
    loss_grad, left = project_loss(torch.zeros(1, 3), torch.ones(1, 3))
    assert (loss_grad.item(), left.item()) == (0, 3)
    assert projected_curvature(torch.zeros(1), torch.zeros(1)).item() == 0


def test_the_default_is_the_loss_of_the_output():
    class Plain(TRAKMixin):
        def model_output(self, batch):
            return batch

    f = torch.linspace(-3, 3, 5)
    torch.testing.assert_close(Plain().per_sample_loss(f), F.softplus(-f))
