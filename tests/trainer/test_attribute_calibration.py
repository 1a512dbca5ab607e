"""Scores are the change that leaving an example out makes."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_trak as lt
from lightning_trak import TRAKCallback
from tests.conftest import make_trainer

# -------------------------------------------------------------------------------------- do the scores mean anything?


class Logistic(lt.TRAKMixin, L.LightningModule):
    """Logistic regression without a bias: convex, f linear in θ, its loss softplus(−f)."""

    def __init__(self, d):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(d))

    def model_output(self, batch):
        x, sign = batch
        return sign * (x @ self.theta)


def fit_logistic(x, sign):
    """Newton's method in float64, to the optimum."""
    theta = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(sign * (x @ theta))
        gradient = -(x * (sign * (1 - p))[:, None]).sum(0)
        hessian = (x * (p * (1 - p))[:, None]).T @ x
        theta = theta - torch.linalg.solve(hessian, gradient)
    return theta


def logistic_data(n, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, torch.where(x.sum(1) + noise > 0, 1.0, -1.0).double()


@pytest.fixture
def logistic(tmp_path):
    """A convex model at its optimum, attributed without damping; data, targets and θ."""
    x, sign = logistic_data(400)
    targets, target_sign = logistic_data(6, seed=1)
    theta = fit_logistic(x, sign)
    torch.save({"theta": theta.float()}, tmp_path / "theta.pt")

    def loader(x, sign):
        return DataLoader(TensorDataset(x.float(), sign.float()), 64)

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader(x, sign)

        def predict_dataloader(self):
            return loader(targets, target_sign)

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", damping=0))
    attribution = trainer.attribute(Logistic(4), datamodule=Data(), ckpt_path=tmp_path / "theta.pt")
    return attribution, x, sign, targets, target_sign, theta


def test_scores_of_a_convex_model_are_calibrated(logistic):
    """They predict what training on a random half gives: its order, and its size."""
    attribution, x, sign, targets, target_sign, _ = logistic
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([torch.randperm(400, generator=generator) < 200 for _ in range(60)])
    outputs = torch.stack([target_sign * (targets @ fit_logistic(x[mask], sign[mask])) for mask in masks])
    evaluation = lt.evaluate(attribution, lt.GroundTruth(masks, outputs[:, None].float()))
    assert evaluation.lds > 0.95
    assert 0.85 < evaluation.slope < 1.15


class TrainedLogistic(Logistic):
    """By gradient descent on the whole train set."""

    def training_step(self, batch, batch_idx):
        return self.output_to_loss(self.model_output(batch), batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=4.0)


@pytest.mark.parametrize(("n", "by"), [(400, "newton"), (3000, "newton"), (400, "sgd")])
def test_the_defaults_are_calibrated_too(tmp_path, n, by):
    """Of a model with fewer parameters than examples, at its optimum: little damping, and outputs as they are."""
    (x, sign), (targets, target_sign) = logistic_data(n), logistic_data(6, seed=1)
    loaders = [DataLoader(TensorDataset(a.float(), b.float()), n) for a, b in ((x, sign), (targets, target_sign))]

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loaders[0]

        def predict_dataloader(self):
            return loaders[1]

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", featurize_on="fit_end"), max_epochs=200)
    if by == "sgd":
        trainer.fit(TrainedLogistic(4), datamodule=Data())
        attribution = trainer.attribute(datamodule=Data())
    else:
        torch.save({"theta": fit_logistic(x, sign).float()}, tmp_path / "theta.pt")
        attribution = trainer.attribute(Logistic(4), datamodule=Data(), ckpt_path=tmp_path / "theta.pt")
    assert (attribution.info.dampings, attribution.info.damping_rules) == ((1e-3,), ("least, as at an optimum",))
    assert attribution.info.temperature == 1
    masks = torch.rand(60, n, generator=torch.Generator().manual_seed(0)) < 0.5
    outputs = torch.stack([target_sign * (targets @ fit_logistic(x[mask], sign[mask])) for mask in masks])
    evaluation = lt.evaluate(attribution, lt.GroundTruth(masks, outputs[:, None].float()))
    assert evaluation.lds > 0.95
    assert 0.85 < evaluation.slope < 1.15


def test_scores_are_the_change_that_leaving_an_example_out_makes(logistic):
    """For a convex model at its optimum a score is f(all) − f(without the example), sign and magnitude."""
    attribution, x, sign, targets, target_sign, theta = logistic
    chosen = {int(row) for row in torch.cat([attribution.top(2).indices, attribution.bottom(2).indices], 1).flatten()}
    predicted, actual = [], []
    for row in sorted(chosen):
        keep = torch.arange(len(x)) != row
        without = fit_logistic(x[keep], sign[keep])
        actual.append(target_sign * (targets @ (theta - without)))
        predicted.append(attribution.scores[row].double())
    predicted, actual = torch.stack(predicted), torch.stack(actual)
    slope = (predicted * actual).sum() / predicted.square().sum()
    assert torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1] > 0.995
    assert 0.9 < slope < 1.1
    for column in range(6):  # and the best proponent raises the output, the worst opponent lowers it
        keep = torch.arange(len(x)) != attribution.top(1).indices[column, 0]
        assert target_sign[column] * (targets[column] @ (theta - fit_logistic(x[keep], sign[keep]))) > 0
        keep = torch.arange(len(x)) != attribution.bottom(1).indices[column, 0]
        assert target_sign[column] * (targets[column] @ (theta - fit_logistic(x[keep], sign[keep]))) < 0


class DigitsCNN(lt.ClassificationMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(256, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_near_duplicates_of_training_digits_find_their_originals(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:800, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[:800])
    L.seed_everything(0, verbose=False)
    rows = torch.randperm(800)[:30]
    blurred = images[rows] + 0.05 * torch.randn_like(images[rows])
    trak = TRAKCallback(tmp_path / "store", proj_dim=512, damping=0.1)  # little, as the README says for duplicates
    trainer = make_trainer(tmp_path, trak, ModelCheckpoint(tmp_path / "files", save_top_k=-1), max_epochs=5)
    trainer.fit(DigitsCNN(), DataLoader(TensorDataset(images, labels), 32, shuffle=True))
    top = trainer.attribute(dataloaders=DataLoader(TensorDataset(blurred, labels[rows]), 32)).top(5)
    found = (top.indices == rows[:, None]).any(1).float().mean().item()
    assert found >= 0.9
