"""Which patients made the model expect this? And which of the train set have a wrong record?

Trains a small network on scikit-learn's diabetes data (how far the disease went in a year, from ten measurements), some
train labels of which are replaced by others', and attributes the predictions for the test patients. Half a minute on
two cores; nothing is downloaded.

    python examples/tabular_regression.py                    # writes examples/output/tabular_regression.png
    python examples/tabular_regression.py --csv FILE --target COLUMN
"""

from __future__ import annotations

import argparse
import csv
from itertools import zip_longest
from pathlib import Path

import lightning as L
import matplotlib as mpl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import auroc

from lightning_trak import Attribution, RegressionMixin, TRAKCallback, evaluate, retrain_subsets


def read(path: Path, target: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read a table: measurements (n, columns), what is to be predicted (n,), and the names of the columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file, skipinitialspace=True) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise SystemExit(f"--csv must be a table in UTF-8 with a header: '{path}' cannot be read ({error}).") from error
    if target not in header:
        raise SystemExit(f"--target must be a column of '{path}', got '{target}'. There are: {', '.join(header)}.")
    if len(rows) < 40:
        raise SystemExit(f"'{path}' has {len(rows)} rows; at least 40 are needed.")
    cells = zip_longest(header, *rows, fillvalue="")
    columns = [(name, np.array([number(cell) for cell in column])) for name, *column in cells]
    wrong = [(name, np.flatnonzero(~np.isfinite(values))) for name, values in columns]
    places = "; ".join(f"'{name}': {len(at)} rows, first in line {at[0] + 2}" for name, at in wrong if len(at))
    if places:
        raise SystemExit(f"'{path}' must hold numbers alone. Take out these columns, or their rows: {places}.")
    varying = [(name, values) for name, values in columns if values.min() < values.max()]
    y, x = dict(varying).get(target), [(name, values) for name, values in varying if name != target]
    if y is None or not x:
        raise SystemExit(f"In '{path}' the target or all other columns are constant: there is nothing to learn.")
    return np.stack([values for _, values in x], 1), y, [name for name, _ in x]


def number(cell: str) -> float:
    """Return the number in a cell, NaN if there is none."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")


class Tabular(L.LightningDataModule):
    """Standardised columns; a tenth of the train labels are those of other examples."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        order = np.random.default_rng(0).permutation(len(x))
        x, y = ((values - values.mean(0)) / values.std(0) for values in (x[order], y[order]))
        n_train = int(0.75 * len(x))
        labels = torch.tensor(y, dtype=torch.float32)
        self.wrong = torch.arange(n_train) < n_train // 10
        labels[:n_train][self.wrong] = labels[:n_train][self.wrong].roll(1)
        inputs = torch.tensor(x, dtype=torch.float32)
        self.train_set = TensorDataset(inputs[:n_train], labels[:n_train])
        self.test_set = TensorDataset(inputs[n_train:], labels[n_train:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=20, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=100)


class Regressor(RegressionMixin, L.LightningModule):
    """Two hidden layers."""

    def __init__(self, n_columns: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_columns, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.mse_loss(self(x).squeeze(1), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def print_examples(attribution: Attribution, data: Tabular, columns: list[str], target: int) -> None:
    """Print the training examples that raised and lowered a prediction the most, by their three largest columns."""
    x, y = data.test_set[target]
    print(f"\ntest example {target} ({describe(x, columns)}), in truth {y:+.1f}:")
    for ranked in (attribution.top(3), attribution.bottom(3)):
        for row, value in zip(ranked.indices[target].tolist(), ranked.values[target].tolist(), strict=True):
            x, y = data.train_set[row]
            change = "raised" if value > 0 else "lowered"
            print(f"  {change} by {abs(value):.3f}: #{row} ({describe(x, columns)}), labelled {y:+.1f}")


def describe(x: torch.Tensor, columns: list[str]) -> str:
    """Name the three columns that are farthest from the mean."""
    return ", ".join(f"{columns[place]} {x[place]:+.1f}" for place in x.abs().topk(min(3, len(x))).indices.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="a table of numbers with a header, in place of the diabetes data")
    parser.add_argument("--target", default="target", help="the column of --csv to predict")
    parser.add_argument("--epochs", type=int, default=15, help="a checkpoint is featurized after each")
    parser.add_argument("--subsets", type=int, default=20, help="retrainings to hold the scores against")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder to write into")
    arguments = parser.parse_args()
    mpl.use("Agg")

    name = "diabetes"
    if arguments.csv:
        x, y, columns = read(arguments.csv, arguments.target)
        name = f"{arguments.csv.stem}-{arguments.target}"
    else:
        source = load_diabetes()
        x, y, columns = source.data, source.target, list(source.feature_names)
    # A store and its retrainings are for one setting.
    folder = arguments.output / "tabular_regression" / f"{name}-epochs{arguments.epochs}"
    L.seed_everything(0)
    data = Tabular(x, y)

    def make_trainer(**options: object) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return L.Trainer(max_epochs=arguments.epochs, accelerator="cpu", **quiet, **options)

    saving = ModelCheckpoint(folder / "checkpoints", save_top_k=-1)
    trainer = make_trainer(callbacks=[saving, TRAKCallback(folder / "attributions")])
    trainer.fit(Regressor(x.shape[1]), datamodule=data)

    attribution = trainer.attribute(datamodule=data)
    print("\nAll numbers are in standard deviations; columns and labels are counted from their means.")
    for target in (0, 1):
        print_examples(attribution, data, columns, target)
    figure, _ = attribution.plot(columns=[0, 1], k=5)
    figure.savefig(arguments.output / "tabular_regression.png", dpi=150)

    suspicion = trainer.attribute_self()
    area = auroc(suspicion.argsort().argsort() / len(suspicion), data.wrong.long(), task="binary")
    print(f"\n{int(data.wrong.sum())} of {len(suspicion)} train labels are wrong.")
    print(f"Self-influence finds them with an AUROC of {area:.3f}; 0.5 is chance.")

    truth = retrain_subsets(
        lambda: Regressor(x.shape[1]),
        data,
        lambda: make_trainer(enable_checkpointing=False),
        arguments.subsets,
        dirpath=folder / "retraining",
    )
    print(f"\n{evaluate(attribution, truth)}")
    print(f"\nThe picture is in {arguments.output / 'tabular_regression.png'}.")


if __name__ == "__main__":
    main()
