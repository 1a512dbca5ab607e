"""Reads the examples of a dataset, for a module at a checkpoint's weights; leaves no trace.

It does not call ``trainer.predict``, which would overwrite the state of a running ``fit``. Weights come in as arguments
(`ModelFunction`), so neither the module's weights nor any ``.grad`` changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_trak.data.batch import same_tensors
from lightning_trak.data.identity import digests_of_rows
from lightning_trak.data.loaders import loader_batch_size
from lightning_trak.gradients import ModelFunction, Selector
from lightning_trak.isolation.random_states import seed_all
from lightning_trak.store.weights import Weights
from lightning_trak.tasks.base import numbered, own_method, prepared
from lightning_trak.tasks.batch import read_batches
from lightning_trak.trainer.host.attachment import undisturbed
from lightning_trak.trainer.host.framework import LightningModule, Trainer, stop_if_asked
from lightning_trak.trainer.host.progress import progress
from lightning_trak.trainer.host.reports import Reports

_WITHOUT_AUGMENTATION = {
    "train": "Define featurize_dataloader() in the LightningDataModule or LightningModule: train_dataloader without"
    " augmentation.",
    "target": "Pass targets without augmentation with dataloaders=..., or define attribute_dataloader() in the"
    " LightningDataModule or LightningModule.",
}


class ExampleReader:
    """Reads the examples of a dataset, for a module at a checkpoint's weights.

    Args:
        trainer: supplies device, precision and progress bar.
        module: the user's model.
        loader: the user's loader; its dataset, collate function and workers are used, its order is not.
        find_train_loader: returns the train loader, for modules that need training examples.
        parameters: names of the attributed parameters.
        selector: knows how many examples the memory allows at a time.
        largest: how many examples at a time, at most; None for as many as selector and loader say.
        examples: what the rows are, for messages: ``"train"`` or ``"target"``.
        reports: takes messages to the user.

    Attributes:
        dataset: has the examples.
        size: their number.
        repeatable: whether two reads of an example are equal; `read_twice` finds out.
        largest: how many examples at a time, at most.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        loader: DataLoader[Any],
        find_train_loader: Callable[[], DataLoader[Any]],
        *,
        parameters: Sequence[str],
        selector: Selector,
        largest: int | None,
        examples: str,
        reports: Reports,
    ) -> None:
        self.trainer, self.module, self.loader = trainer, module, loader
        self.dataset: Any = loader.dataset
        self.size = len(loader.dataset)  # type: ignore[arg-type]
        self._find_train_loader, self.parameters = find_train_loader, list(parameters)
        self.selector, self.examples, self.reports = selector, examples, reports
        self._label: Callable[[Any], Any] | None = None
        self.repeatable = True
        sizes = (selector.given or loader_batch_size(loader), self.size, largest)
        self.largest = min(size for size in sizes if size is not None)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of entries of each attributed parameter, in order."""
        own = dict(self.module.named_parameters())
        return {name: own[name].numel() for name in self.parameters}

    @property
    def n_trainable(self) -> int:
        """The number of trained parameters; if all are frozen, of attributed ones."""
        trained = sum(value.numel() for value in self.module.parameters() if value.requires_grad)
        return trained or sum(self.sizes.values())

    @property
    def device(self) -> torch.device:
        """Where the module is evaluated."""
        return self.trainer.strategy.root_device

    @property
    def batch_size(self) -> int:
        """How many examples are read at a time now, unless the engine takes fewer."""
        return self.selector.batch_size(self.largest)

    def label_targets(self, load: Callable[[], Weights]) -> None:
        """Let the module label targets, if it can, with the weights that ``load`` returns."""
        label = own_method(self.module, "label_targets")
        if label is not None:
            self._label = partial(self._function(load()).call, label)

    @contextmanager
    def at(self, weights: Weights) -> Iterator[ModelFunction]:
        """Yield the module at a checkpoint's weights, which it may change; everything else is left as it was."""
        with undisturbed(self.trainer, self.module, self.dataset, self.loader.collate_fn):
            function = self._function(weights)
            with prepared(self.module, function.prepare, self._find_train_loader):
                yield function

    def read(
        self, rows: Iterable[int], batch_size: int, num_workers: int | None = None, *, labelled: bool = True
    ) -> Iterator[tuple[Sequence[int], Any]]:
        """Yield (rows, batch), as the module gets it."""
        dataset = None if self.examples == "train" else self.dataset
        for own, batch in read_batches(self.trainer, self.module, self.loader, rows, batch_size, num_workers):
            complete = self._label(batch) if labelled and self._label is not None else batch
            yield own, numbered(self.module, complete, own, dataset)

    def read_once(self, rows: Sequence[int], seed: int = 0) -> Any:
        """Return a batch of these rows, in this process."""
        seed_all(seed)
        return next(self.read(rows, len(rows), num_workers=0))[1]

    def read_twice(self, rows: Sequence[int]) -> Any:
        """Return a batch of these rows; note whether another read with another seed is equal, else warn."""
        batch = self.read_once(rows)
        self.repeatable = same_tensors(batch, self.read_once(rows, seed=1))
        if not self.repeatable:
            self.reports.warn(
                f"Two reads of the same {self.examples} examples differ: the dataset, its collate function or a"
                " batch-transfer hook augments at random. Features are those of one random draw."
                f" {_WITHOUT_AUGMENTATION[self.examples]}",
                about=f"reads of {self.examples} examples",
            )
        return batch

    def digests(self, weights: Weights) -> list[bytes] | None:
        """Return a digest of each example, as the module gets it; None if they are random, or cannot be compared."""
        if not self.repeatable:
            return None
        with progress(self.trainer, "Reading targets", self.size) as advance, self.at(weights):
            seed_all(0)
            found: list[bytes] = []
            for rows, batch in self.read(range(self.size), self.largest):
                own = digests_of_rows(batch, len(rows))
                if own is None:
                    return None
                found += own
                advance(len(rows))
            return found

    def without_gradients(
        self,
        weights: Weights,
        work: Callable[[ModelFunction, Sequence[int], Any], object],
        description: str,
        *,
        labelled: bool = True,
    ) -> None:
        """Call ``work`` with (function, rows, batch) for each batch of all examples, in order, at one checkpoint.

        With ``labelled``, targets have the labels that the module gave them.
        """
        with progress(self.trainer, description, self.size) as advance, self.at(weights) as function:
            seed_all(0)
            size = 1 if self.selector.gradients == "loop" else self.batch_size
            for rows, batch in self.read(range(self.size), size, labelled=labelled):
                with torch.no_grad():
                    work(function, rows, batch)
                advance(len(rows))
                stop_if_asked(self.trainer)

    def _function(self, weights: Weights) -> ModelFunction:
        """Return the module at a checkpoint's weights."""
        plugin = self.trainer.precision_plugin
        for name, value in self.module.named_parameters():
            stored = weights.get(name, value).dtype
            if stored not in (value.dtype, plugin.convert_input(value.detach().reshape(-1)[:0]).dtype):
                raise ValueError(
                    f"The checkpoint's {name} is {stored}, the model's {value.dtype} under"
                    f" Trainer(precision={plugin.precision!r}). Use the precision of the training."
                )
        return ModelFunction(self.module, weights, self.parameters, self.device, plugin.convert_input)
