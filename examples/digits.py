"""Which training digits made the model say this? And which of them are labelled wrongly?

Trains a small CNN on scikit-learn's digits, some of them mislabelled on purpose, featurizes the train set as
checkpoints are saved, attributes the test digits, and writes a report. Then trains again without the suspects, and
compares. Nothing is downloaded.

    python examples/digits.py                 # writes digits.png and digits.html into examples/output
    python examples/digits.py --help
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import matplotlib as mpl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.functional import auroc

from lightning_trak import Attribution, ClassificationMixin, Suspects, TRAKCallback


class DigitsData(L.LightningDataModule):
    """1797 images of 8 × 8 pixels, in train and test; some training labels are replaced by wrong ones."""

    def __init__(self, n_train: int = 1400, mislabelled: int = 140) -> None:
        super().__init__()
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)[order]
        self.true_labels = torch.tensor(digits.target)[order]
        labels = self.true_labels.clone()
        labels[:mislabelled] = (labels[:mislabelled] + torch.arange(mislabelled) % 9 + 1) % 10
        shuffled = torch.randperm(n_train, generator=torch.Generator().manual_seed(1))
        self.train_set = TensorDataset(images[shuffled], labels[shuffled])
        self.test_set = TensorDataset(images[n_train:], labels[n_train:])
        self.wrong = shuffled < mislabelled  # (n_train,), what the example is to find out
        self.true_labels = self.true_labels[shuffled]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=64, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=64)


class DigitsCNN(ClassificationMixin, L.LightningModule):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test_accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def print_examples(attribution: Attribution, data: DigitsData, targets: list[int]) -> None:
    """Print the most helpful and most harmful training examples of some targets."""
    top, bottom = attribution.top(5), attribution.bottom(5)
    labels = data.train_set.tensors[1].tolist()
    for target in targets:
        print(f"\ntest digit {target}, a {data.test_set.tensors[1][target]}")
        for name, ranked in (("helpful", top), ("harmful", bottom)):
            rows, values = ranked.indices[target].tolist(), ranked.values[target].tolist()
            shown = (f"#{row} (a {labels[row]}, {value:+.2f})" for row, value in zip(rows, values, strict=True))
            print(f"  most {name}: {', '.join(shown)}")


def print_mislabels(suspects: Suspects, data: DigitsData) -> None:
    """Name the training examples that are probably mislabelled, and say which were planted."""
    n_wrong = int(data.wrong.sum())
    found = [row for row in suspects.indices[:n_wrong].tolist() if data.wrong[row]]
    ranks = suspects.indices.argsort() / len(suspects)  # of each row; torchmetrics takes numbers from 0 to 1
    area = auroc(1 - ranks, data.wrong.long(), task="binary")
    print(
        f"\n{len(found)} of the {n_wrong} planted mislabels are among the first {n_wrong} suspects (AUROC {area:.3f}):"
    )
    for row in found:
        print(f"  #{row} is labelled {data.train_set.tensors[1][row]}, it is a {data.true_labels[row]}")


def accuracy(train_set: Dataset, data: DigitsData, epochs: int, runs: int) -> float:
    """Train new models, and return their accuracy on the test digits in percent, averaged."""
    found = []
    for seed in range(1, runs + 1):
        L.seed_everything(seed, verbose=False)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, **quiet)
        model = DigitsCNN()
        trainer.fit(model, DataLoader(train_set, batch_size=64, shuffle=True))
        found += [result["test_accuracy"] for result in trainer.test(model, data.test_dataloader(), verbose=False)]
    return 100 * sum(found) / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="a checkpoint is featurized after every third")
    parser.add_argument("--runs", type=int, default=3, help="trainings with and without the suspects")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder to write into")
    arguments = parser.parse_args()
    mpl.use("Agg")

    folder = arguments.output / "digits" / f"epochs{arguments.epochs}"  # a store is for one setting
    L.seed_everything(0)
    data, model = DigitsData(), DigitsCNN()
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", save_top_k=-1, every_n_epochs=3),
            TRAKCallback(folder / "attributions", proj_dim=512),
        ],
    )
    trainer.fit(model, datamodule=data)

    attribution = trainer.attribute(datamodule=data)
    targets = [0, 1, 2, 3]
    print_examples(attribution, data, targets)
    figure, _ = attribution.plot(data.train_set, data.test_set, columns=targets, k=5, marked=data.wrong)
    figure.savefig(arguments.output / "digits.png", dpi=80)

    suspects = trainer.suspects()
    print_mislabels(suspects, data)
    report = attribution.report(arguments.output / "digits.html", data.train_set, data.test_set, suspects=suspects)
    few = attribution.remove(data.train_set, suspects.indices[: int(data.wrong.sum())])
    print(f"\nTraining {arguments.runs} times with all digits, and as often without the first suspects ...")
    before, after = (accuracy(train_set, data, arguments.epochs, arguments.runs) for train_set in (data.train_set, few))
    print(f"accuracy on the test digits: {before:.1f} % with all, {after:.1f} % with the {len(few)} that are left")
    print(f"\nThe picture is in {arguments.output / 'digits.png'}, a report in {report}.")


if __name__ == "__main__":
    main()
