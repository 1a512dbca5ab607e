"""One training with and without TRAKCallback, to be compared to the bit; and how well planted labels are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc

from lightning_trak import FeatureStore, TRAKCallback

ENGINES = ["hooks", "vmap", "loop"]


class Recorder(Logger):
    """Keeps everything that is logged, but for what `TRAKCallback` tells."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        own = {name: value for name, value in metrics.items() if not name.startswith("trak/")}
        self.logged += [(step, own)] * bool(own)


class Data(L.LightningDataModule):
    """A loader of the train set, and one of the targets, on which a module that can is validated too."""

    def __init__(self, train: DataLoader[Any], targets: DataLoader[Any], *, validates: bool = True) -> None:
        super().__init__()
        self.train_dataloader, self.test_dataloader = lambda: train, lambda: targets
        if validates:
            self.val_dataloader = self.test_dataloader


def fit(
    root: Path, build: Callable[[], L.LightningModule], data: Data, *callbacks: L.Callback, **options: Any
) -> L.Trainer:
    """Build a module and train it from one seed, logging at every step."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=Recorder(),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(build(), datamodule=data)
    return trainer


def assert_same_training(
    root: Path, build: Callable[[], L.LightningModule], data: Data, gradients: str, **options: Any
) -> None:
    """Assert that weights, optimizers, all that was logged and the random state are the same without the callback."""
    with_trak = fit(root / "with", build, data, TRAKCallback(root / "trak", gradients=gradients), **options)
    random = torch.rand(3)
    without = fit(root / "without", build, data, **options)
    assert torch.equal(random, torch.rand(3))
    assert_equal(with_trak.lightning_module.state_dict(), without.lightning_module.state_dict())
    assert_equal([o.state_dict() for o in with_trak.optimizers], [o.state_dict() for o in without.optimizers])
    assert_equal(with_trak.logger.logged, without.logger.logged)
    assert without.logger.logged
    store = FeatureStore(root / "trak")
    assert [store[digest].complete for digest in store.digests] == [True] * options["max_epochs"]


def assert_equal(one: Any, other: Any) -> None:
    """Assert that two nested containers are equal to the bit, NaN equal to NaN."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    elif isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other


def auroc(values: Tensor, planted: Sequence[int]) -> float:
    """Return how well high values tell the planted examples from the others: 1/2 by chance."""
    is_planted = torch.zeros(len(values), dtype=torch.long)
    is_planted[list(planted)] = 1
    return binary_auroc(values, is_planted).item()
