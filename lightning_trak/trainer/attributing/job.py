"""The job before scoring: a model on its device, checkpoints of its store, and the train set featurized at them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.influence import Estimator, Options
from lightning_trak.results.status import status_of
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.files import PARTIAL, check_space
from lightning_trak.store.remote import AnyPath
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import names_of_weights, read_weights
from lightning_trak.trainer.attributing.ckpt_path import CkptPath, files_of, of_files, of_store
from lightning_trak.trainer.callback import TRAKCallback, find_callback
from lightning_trak.trainer.featurizing.checkpoints import check_some, featurize_checkpoint, mended
from lightning_trak.trainer.featurizing.curvature import rescaled
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop
from lightning_trak.trainer.featurizing.opening import fitting_store, open_store
from lightning_trak.trainer.featurizing.plan import Plan
from lightning_trak.trainer.featurizing.preflight import preflight
from lightning_trak.trainer.featurizing.train_features import train_features
from lightning_trak.trainer.host.attachment import attached
from lightning_trak.trainer.host.framework import (
    LightningDataModule,
    LightningModule,
    Trainer,
    check_supported,
    framework_of,
    is_datamodule,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_trak.trainer.host.loaders import Loaders

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """Featurized checkpoints of a store, and what is needed to attribute targets with them.

    Attributes:
        trainer: supplies device and progress bar.
        model: the model.
        store: holds the train features.
        plan: how targets are featurized.
        entries: the checkpoints to average over.
        loaders: find the targets.
        datamodule: supplies data, unless the model does.
        options: of the estimator.
        memory_limit: scores that take more bytes stay on disk.
        whole_store: whether all checkpoints of the store are meant, whichever they are.
    """

    trainer: Trainer
    model: LightningModule
    store: FeatureStore
    plan: Plan
    entries: list[CheckpointEntry]
    loaders: Loaders
    datamodule: LightningDataModule | None
    options: Options
    memory_limit: float
    whole_store: bool

    def featurized(self, compute: Callable[[], T]) -> T:
        """Featurize the train set where features are missing, then call ``compute``, which reads them.

        If it finds some of them damaged, all that are damaged are featurized again, and it is called again.
        """

        def run() -> T:
            self._leave_out_deleted()
            self._featurize_missing()
            vars(self).pop("scales", None)  # of a curvature that was damaged
            return compute()

        return mended(self.entries, run)

    @property
    def runs(self) -> int:
        """The number of runs that the checkpoints are from; 0 if that is unknown."""
        runs = {entry.meta.get("run") for entry in self.entries}
        return 0 if None in runs else len(runs)

    @property
    def n_params(self) -> int:
        """The number of all parameters of the model."""
        return sum(value.numel() for value in self.model.parameters())

    def say_what_was_averaged(self) -> None:
        """Print a line on checkpoints and parameters."""
        whitened, plan = self.plan.preconditioner is not None, self.plan
        status = status_of(len(self.entries), self.runs, (plan.n_params, self.n_params), plan.engine, whitened=whitened)
        rank_zero_info(f"TRAKCallback: {status}.")

    def _leave_out_deleted(self) -> None:
        """Leave out checkpoints that a running ``fit`` has discarded since, with their files.

        If all are gone, those that it has saved since take their place. Several processes could not agree on them.

        Raises:
            MisconfigurationException: if none is left.
        """
        for entry in [entry for entry in self.entries if not entry.path.is_dir()]:
            rank_zero_warn(f"Checkpoint {entry.digest} was deleted from the store in the meantime, and is left out.")
            self.entries.remove(entry)
        if not self.entries and self.whole_store and self.trainer.world_size == 1:
            self.entries.extend(self.store.entries())
        if not self.entries:
            raise framework_of(self.trainer).MisconfigurationException(
                f"All checkpoints that were to be attributed are deleted by now from '{self.store.dirpath}'. Call"
                " attribute again when training has saved another."
            )

    def _featurize_missing(self) -> None:
        """Check a few stored features, then featurize the train set at checkpoints without features."""
        missing = [entry for entry in self.entries if not entry.complete]
        if missing:
            missing[0].check_writable()
        complete = [entry for entry in self.entries if entry not in missing]
        loader = self.loaders.train() if missing else self.loaders.train_if_defined()
        if loader is None:
            return
        loop, first = self.loop("train"), self.entries[0]
        preflight(loop, first.weights(), first.digest)
        check_some(loop, [(entry, entry.train) for entry in complete])
        rows = sum(len(chunk) for entry in missing for chunk in entry.train.missing())
        check_space(self.store.dirpath, rows * loop.form.row_bytes)
        for number, entry in enumerate(missing, 1):
            featurize_checkpoint(loop, entry, f"{number}/{len(missing)}")

    @cached_property  # each needs the curvature's file
    def scales(self) -> list[Tensor | None]:
        """Return by what to multiply whitened features at every checkpoint; see `rescaled`."""
        own = self.plan.preconditioner
        if own is None:
            return [None] * len(self.entries)
        return rescaled(self.entries, own, {name: prod(shape) for name, shape in self.plan.shapes.items()})

    def loop(self, examples: str) -> FeaturizationLoop:
        """Return the loop that featurizes the ``"train"`` set or the ``"target"`` set."""
        loader = self.loaders.targets() if examples == "target" else self.loaders.train()
        return self.plan.loop(self.trainer, self.model, loader, self.loaders.train, examples)

    def target_loop(self) -> FeaturizationLoop:
        """Return the loop of the targets, after labelling them and trying a few."""
        loop, first, last = self.loop("target"), self.entries[0], self.entries[-1]
        loop.reader.label_targets(last.weights)
        preflight(loop, first.weights(), first.digest)
        return loop

    def estimator(self) -> Estimator:
        """Return the estimator over the train features of all checkpoints."""
        own = self.plan.preconditioner
        dimension, rest = None if own is None else self.plan.n_params, own is not None and own.rest
        device = self.trainer.strategy.root_device
        device = device if device.type == "cuda" else torch.device("cpu")  # others lack float64
        pairs = zip(self.entries, self.scales, strict=True)
        trains = [train_features(entry, dimension, rest=rest, scales=scales) for entry, scales in pairs]
        return Estimator(trains, self.options, device)


@contextmanager
def prepared_job(
    trainer: Trainer, model: Any, dataloaders: Any, datamodule: LightningDataModule | None, ckpt_path: CkptPath
) -> Iterator[Job]:
    """Open the store and choose its checkpoints; `Job.featurized` featurizes the train set at them."""
    with ready(trainer, model, dataloaders, datamodule, ckpt_path) as (callback, model, datamodule, loaders):
        path, files = callback.store_path(trainer), files_of(trainer, ckpt_path)
        if files is not None and not (path / "manifest.json").exists():
            plan = Plan.choose(callback.settings, callback.reports, trainer, model, loaders.train())
            store = fitting_store(path, plan, loaders.train())
        else:
            store, plan = open_store(path, callback.settings, callback.reports, trainer, model, loaders)
        if files is None:
            digests = of_store(trainer, store, ckpt_path, callback.last_saved)
        else:
            digests = of_files(trainer, store, files)
        # Of the first process: another may find other checkpoints, if a running fit adds some.
        entries = store.entries(trainer.strategy.broadcast(digests))
        options = Options(callback.damping, callback.temperature, callback.curvature, callback.estimator)
        limit, whole = callback.memory_limit, ckpt_path is None
        yield Job(trainer, model, store, plan, entries, loaders, datamodule, options, limit, whole)


@contextmanager
def ready(
    trainer: Trainer, model: Any, dataloaders: Any, datamodule: LightningDataModule | None, ckpt_path: CkptPath
) -> Iterator[tuple[TRAKCallback, LightningModule, LightningDataModule | None, Loaders]]:
    """Check model and data, and put the model on its device; everything is left as it was.

    Yields:
        The trainer's callback, the model, the datamodule, and what finds the loaders.
    """
    callback, framework = find_callback(trainer), framework_of(trainer)
    model, dataloaders, datamodule = _sorted_out(model, dataloaders, datamodule)
    model = trainer.lightning_module if model is None else model
    model = getattr(model, "_orig_mod", model)  # compiled
    if model is None:
        raise TypeError("trainer.attribute() needs a model when the trainer has fitted none: attribute(model, ...).")
    framework.check_kind("model", model, "LightningModule")
    check_supported(trainer, model)
    fitted = callback.train_loader if datamodule in (None, trainer.datamodule) else None
    datamodule = datamodule or trainer.datamodule
    if datamodule is not None:
        framework.check_kind("datamodule", datamodule, "LightningDataModule")
    fresh = model._trainer is None
    with attached(trainer, model, datamodule):
        loaders = Loaders(trainer, model, datamodule, dataloaders, fitted)
        if fresh:
            _build(model, loaders, callback.store_path(trainer), ckpt_path)
        yield callback, model, datamodule, loaders


def _sorted_out(model: Any, dataloaders: Any, datamodule: Any) -> tuple[Any, Any, Any]:
    """Return model, dataloaders and datamodule; a datamodule may be passed as either of the others."""
    if isinstance(model, DataLoader):
        raise TypeError("model must be a LightningModule, got a DataLoader. Pass targets with dataloaders=... instead.")
    datamodules = [value for value in (model, dataloaders, datamodule) if is_datamodule(value)]
    if len(datamodules) > 1:
        raise TypeError("Several datamodules were passed, expected one. Pass it with datamodule=... alone.")
    model, dataloaders = (None if is_datamodule(value) else value for value in (model, dataloaders))
    return model, dataloaders, datamodules[0] if datamodules else datamodule


def _build(model: LightningModule, loaders: Loaders, store: AnyPath, ckpt_path: CkptPath) -> None:
    """Let a model that was never fitted build layers in its hooks, which are called in Lightning's order."""
    model.configure_model()
    names = _names_of_weights(store, ckpt_path)
    if names is None or names <= set(model.state_dict()):
        return
    loaders.set_up("fit")
    model.configure_model()


def _names_of_weights(store: AnyPath, ckpt_path: CkptPath) -> set[str] | None:
    """Return the names of one checkpoint's weights; None if there is no checkpoint yet."""
    paths = [ckpt_path] if isinstance(ckpt_path, (str, os.PathLike)) else list(ckpt_path or [])
    given = [path for path in paths if path not in ("best", "last")]
    if given:
        return set(read_weights(given[0]))
    for path in store.glob("checkpoints/*/weights.safetensors"):
        if not path.parent.name.endswith(PARTIAL):  # which another process is about to rename
            with suppress(FileNotFoundError):
                return names_of_weights(path)
    return None
