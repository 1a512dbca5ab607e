"""What ``fit`` costs beyond the featurization itself with ``featurize_on="fit_end"``."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_trak import TRAKCallback
from tests.benchmarks.measuring import print_table, seconds, trainer
from tests.benchmarks.models import MODELS


class Timed(TRAKCallback):
    """Knows how long the featurization took, and how long everything else that it does."""

    featurizing = other = 0.0

    def on_fit_end(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_fit_end(*args)
        self.featurizing += time.perf_counter() - start

    def on_train_start(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_train_start(*args)
        self.other += time.perf_counter() - start

    def file_saved(self, *args: Any) -> None:
        start = time.perf_counter()
        super().file_saved(*args)
        self.other += time.perf_counter() - start


def run(key: str = "resnet9", n: int = 640, epochs: int = 5, repeats: int = 3) -> None:
    """Print the table."""
    header = ["model", "fit without the callback, s", "with it, less featurization, s", "of these in its hooks, s (%)"]
    print_table("Overhead of fit, featurize_on='fit_end'", header, _rows(key, n, epochs, repeats))


def _rows(key: str, n: int, epochs: int, repeats: int) -> Iterator[list[str]]:
    model, without, beyond, hooks = MODELS[key], [], [], []
    for _ in range(repeats):  # in turn: machines change their speed
        with tempfile.TemporaryDirectory() as root:
            without.append(seconds(partial(_fit, model.build(), model.loader(n), root, epochs)))
        with tempfile.TemporaryDirectory() as root:
            callback = Timed(featurize_on="fit_end")
            whole = seconds(partial(_fit, model.build(), model.loader(n), root, epochs, callback))
            beyond.append(whole - callback.featurizing)
            hooks.append(callback.other)
    one, other, own = map(statistics.median, (without, beyond, hooks))
    yield [model.name, f"{one:.2f}", f"{other:.2f}", f"{own:.2f} ({100 * own / one:.1f})"]


def _fit(module: L.LightningModule, loader: Any, root: str, epochs: int, *callbacks: L.Callback) -> None:
    module.train()
    own = trainer(root, ModelCheckpoint(save_top_k=-1), *callbacks, accelerator="cpu", max_epochs=epochs)
    own.fit(module, loader)
