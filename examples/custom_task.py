"""A task of one's own, in the fewest lines: which of two handwritten digits is the larger?

A ranker is trained on comparisons of scikit-learn's digits, some of which are the wrong way round. All that
attribution needs is ``model_output``: by how much does the first image win? The default loss, softplus(−f), is the one
of Bradley and Terry that the ranker is trained on. Under twenty seconds on two cores; nothing is downloaded.

    python examples/custom_task.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import auroc

from lightning_trak import TRAKCallback, TRAKMixin


class Ranker(TRAKMixin, L.LightningModule):
    """Gives every image a number; that of the larger digit is to be larger."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    def model_output(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        larger, smaller = batch
        return (self.value(larger) - self.value(smaller)).squeeze(1)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return softplus(-self.model_output(batch)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def comparisons(n: int, wrong: int) -> TensorDataset:
    """Return n pairs of images, the larger digit first, but for the first ``wrong`` of them."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    pairs = torch.randint(len(labels), (3 * n, 2), generator=torch.Generator().manual_seed(0))
    pairs = pairs[labels[pairs[:, 0]] > labels[pairs[:, 1]]][:n]
    pairs[:wrong] = pairs[:wrong].flip(1)
    return TensorDataset(images[pairs[:, 0]], images[pairs[:, 1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="a checkpoint is featurized after each")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder to write into")
    arguments = parser.parse_args()

    folder = arguments.output / "custom_task" / f"epochs{arguments.epochs}"  # a store is for one setting
    L.seed_everything(0)
    wrong = torch.arange(1500) < 75
    train = DataLoader(comparisons(1500, int(wrong.sum())), batch_size=50, shuffle=True)
    saving = ModelCheckpoint(folder / "checkpoints", save_top_k=-1)
    trak = TRAKCallback(folder / "attributions", proj_dim=512)
    trainer = L.Trainer(max_epochs=arguments.epochs, accelerator="cpu", logger=False, callbacks=[saving, trak])
    trainer.fit(Ranker(), train)

    suspicion = trainer.attribute_self()
    suspects = suspicion.argsort(descending=True)[: int(wrong.sum())]
    area = auroc(suspicion.argsort().argsort() / len(suspicion), wrong.long(), task="binary")
    found = int(wrong[suspects].sum())
    print(f"{found} of the {len(suspects)} wrong comparisons are among the first {len(suspects)} suspects")
    print(f"of {len(suspicion)} (AUROC {area:.3f}; 0.5 is chance).")


if __name__ == "__main__":
    main()
