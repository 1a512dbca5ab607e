"""Small models and data that the tests of the Lightning side share."""

from __future__ import annotations

import gc
import logging
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, so one thread in each; torch reads it when imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: F401 - before `gc.freeze`: it looks for referrers of random states, and would find none
import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_trak as lt
from lightning_trak.gradients.rules.registry import _RULES


def pytest_collection_finish():
    """Leave out of later garbage collections what importing and collecting made: each would look at all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def figures_closed():
    """No test finds figures that another left open, whichever ran before in this process."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def make_data(n: int, seed: int = 0) -> TensorDataset:
    """Three overlapping blobs in four dimensions."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = torch.eye(4)[y] * 1.5 + torch.randn(n, 4, generator=generator)
    return TensorDataset(x, y)


class Classifier(lt.ClassificationMixin, L.LightningModule):
    """A small net with what makes training stateful: Dropout, BatchNorm, Adam, a learning rate schedule."""

    def __init__(self, hidden: int = 6, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, hidden),
            torch.nn.BatchNorm1d(hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(hidden, 3),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class Blobs(L.LightningDataModule):
    """Splits are made in ``setup`` for the stage asked for, and only for that."""

    def __init__(self, n: int = 40, m: int = 7, seed: int = 0, num_workers: int = 0, batch_size: int = 8):
        super().__init__()
        self.n, self.m, self.seed, self.num_workers, self.batch_size = n, m, seed, num_workers, batch_size

    def setup(self, stage):
        if stage == "fit":
            self.train_set = make_data(self.n, self.seed)
            self.val_set = make_data(12, 1)
        if stage == "test":
            self.test_set = make_data(self.m, 2)

    def train_dataloader(self):
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self):
        return DataLoader(self.val_set, 6)

    def test_dataloader(self):
        return DataLoader(self.test_set, 3, num_workers=self.num_workers)


class Shift(torch.nn.Module):
    """A layer without a rule, until a test registers one under `_restored_rules`."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x + self.shift


@pytest.fixture
def _restored_rules():
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)


@pytest.fixture
def said(caplog, monkeypatch):
    """What the library tells the user, so far."""
    for package in ("lightning.pytorch", "pytorch_lightning"):  # the one imported last passes messages on
        monkeypatch.setattr(logging.getLogger(package), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: [message for message in caplog.messages if message.startswith("TRAKCallback: ")]


def make_trainer(root, *callbacks, **kwargs) -> L.Trainer:
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=root, callbacks=list(callbacks), **{**defaults, **kwargs})
