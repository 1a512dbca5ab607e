"""What is disturbed: tiny trainings, attributions and retrainings, which go on where an earlier call was killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_trak as lt
from lightning_trak import Attribution, TRAKCallback
from lightning_trak.features.largest import matrix_of
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import read_weights, weights_digest
from lightning_trak.trainer.featurizing import plan
from tests.conftest import make_data, make_trainer

EPOCHS = 3
Outcome = dict[str, np.ndarray]


class Net(lt.ClassificationMixin, L.LightningModule):
    """A net of three classes, which trains the same whether or not it is interrupted between two epochs."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Data(L.LightningDataModule):
    """Three blobs, in the same order in every epoch."""

    def train_dataloader(self):
        return DataLoader(make_data(36), 9)

    def val_dataloader(self):
        return DataLoader(make_data(12, 1), 12)

    def test_dataloader(self):
        return DataLoader(make_data(5, 2), 5)


class Targets(L.LightningDataModule):
    """The targets alone: nothing can be featurized again."""

    def test_dataloader(self):
        return Data().test_dataloader()


@dataclass(frozen=True)
class Training:
    """How a run saves checkpoints, and how they are featurized.

    Attributes:
        saving: arguments of `ModelCheckpoint`.
        tracking: arguments of `TRAKCallback`.
        kept: whether the store has the weights of the files that Lightning kept, and no others.
    """

    saving: dict[str, Any]
    tracking: dict[str, Any] = field(default_factory=dict)
    kept: bool = False

    def trainer(self, folder: Path) -> L.Trainer:
        """Return a new trainer."""
        saving = ModelCheckpoint(folder / "files", **self.saving)
        return make_trainer(folder, TRAKCallback(folder / "store", **self.tracking), saving, max_epochs=EPOCHS)

    def resumes_from(self, folder: Path) -> str | None:
        """Return what a user would pass as ``ckpt_path`` after an interruption."""
        files = sorted((folder / "files").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        if not files:
            return None
        return "last" if self.saving.get("save_last") and (folder / "files" / "last.ckpt").exists() else str(files[-1])

    def fit(self, folder: Path) -> L.Trainer:
        """Train, from the last checkpoint file if there is one."""
        L.seed_everything(0, verbose=False)
        trainer = self.trainer(folder)
        trainer.fit(Net(), datamodule=Data(), ckpt_path=self.resumes_from(folder))
        return trainer

    def run(self, folder: Path) -> Outcome:
        """Train and attribute; return scores and features."""
        trainer = self.fit(folder)
        return {"scores": trainer.attribute(name="scores").scores.numpy(), **stored(folder)}


EVERY = {"save_top_k": -1}
BEST = {"save_top_k": 1, "monitor": "val_loss"}
TRAININGS = {
    "every": Training(EVERY),
    "plain": Training(EVERY, {"preconditioner": "none"}),
    "last": Training({"save_last": True}),
    "best": Training(BEST, {"preconditioner": "none"}),
    "fit_end": Training(BEST, {"featurize_on": "fit_end"}, kept=True),
    "overwrite": Training(EVERY, {"preconditioner": "none", "overwrite": True}),
}
FORMER = {  # what is there before a scenario: who makes it, and in which folder it is
    "files": (TRAININGS["every"], "files"),
    "overwrite": (Training(EVERY, {"preconditioner": "none", "proj_dim": 8}), "store"),
}


def retraining(folder: Path) -> Outcome:
    """Retrain on two subsets; return masks and outputs."""
    L.seed_everything(0, verbose=False)

    def silent() -> L.Trainer:
        return make_trainer(folder, max_epochs=1, enable_checkpointing=False)

    truth = lt.retrain_subsets(Net, Data(), silent, 2, repeats=2, dirpath=folder / "retraining")
    return {"masks": truth.masks.numpy(), "outputs": truth.repeats.numpy()}


def attribute_files(
    folder: Path, files: Sequence[Path] | None = None, *, data: Callable[[], Any] = Data, **tracking: Any
) -> Outcome:
    """Attribute checkpoint files, by default those in ``folder/files``; return scores and features."""
    chosen = sorted((folder / "files").glob("*.ckpt")) if files is None else files
    trainer = make_trainer(folder, TRAKCallback(folder / "store", **tracking))
    scores = trainer.attribute(Net(), datamodule=data(), ckpt_path=chosen, name="scores").scores
    return {"scores": scores.numpy(), **stored(folder)}


def attribute_store(folder: Path, data: Callable[[], Any] = Data, name: str | None = None) -> Outcome:
    """Attribute with all checkpoints of a store; return the scores."""
    trainer = make_trainer(folder, TRAKCallback(folder / "store"))
    return {"scores": trainer.attribute(Net(), datamodule=data(), name=name).scores.numpy()}


SCENARIOS: dict[str, Callable[[Path], Outcome]] = {
    **{name: training.run for name, training in TRAININGS.items()},
    "files": attribute_files,
    "retraining": retraining,
}


def stored(folder: Path) -> Outcome:
    """Return the saved scores, and the features of every checkpoint in a store."""
    found = {"saved": Attribution.load(folder / "store" / "scores" / "scores").scores.numpy()}
    for entry in FeatureStore(folder / "store"):
        features = dense(entry.features)
        found |= {f"{entry.digest} features": features, f"{entry.digest} loss_grad": entry.loss_grad}
    return found


def dense(features: Any) -> np.ndarray:
    """Return features as one array, (n, k) or (n, p)."""
    if isinstance(features, np.ndarray):
        return features
    matrix = matrix_of(features)
    return torch.zeros(len(matrix), 64).scatter(1, matrix.columns, matrix.values).numpy()


def kept_digests(folder: Path) -> set[str]:
    """Return the digests of the checkpoint files that are there."""
    return {weights_digest(read_weights(path)) for path in (folder / "files").glob("*.ckpt")}


def with_small_chunks() -> None:
    """From now on in this process, new stores have chunks of 8 rows, so that there are several."""
    plan.rows_in_a_chunk = lambda *_: 8
