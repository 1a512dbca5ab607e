"""What every benchmark does: time, and print tables."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from lightning_trak import TRAKCallback


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def plain_pass(module: L.LightningModule, batches: Iterable[Any]) -> None:
    """Run forward and backward over batches, as the cheapest training there can be: no loss, no optimizer."""
    for batch in batches:
        module.zero_grad(set_to_none=True)
        module.model_output(batch).sum().backward()
    module.zero_grad(set_to_none=True)


def trainer(root: Any, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    """Return a silent trainer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=root, callbacks=list(callbacks), **{**quiet, **kwargs})


def attribute(module: L.LightningModule, train: Any, targets: Any, root: Any, ckpt_path: Any, **kwargs: Any) -> Any:
    """Featurize and score at one checkpoint or more, in a new store: one whole call of ``trainer.attribute``."""
    kwargs = {"accelerator": "cpu", **kwargs}
    accelerator = kwargs.pop("accelerator")
    own = trainer(root, TRAKCallback(f"{root}/trak", **kwargs), accelerator=accelerator)
    data = L.LightningDataModule.from_datasets(train.dataset, batch_size=train.batch_size)
    return own.attribute(module, targets, datamodule=data, ckpt_path=ckpt_path)


@contextmanager
def silence() -> Iterator[None]:
    """Keep advice about loaders and the like out of the tables."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> None:
    """Print a Markdown table, row by row as it is measured."""
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    if note:
        print(f"\n{note}", flush=True)
