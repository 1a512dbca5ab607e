"""Finds the loaders of train set and targets."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_trak.data.loaders import check_loader
from lightning_trak.trainer.host.framework import (
    LightningDataModule,
    LightningModule,
    Trainer,
    framework_of,
    is_overridden,
)

_STAGES = {
    "attribute_dataloader": "predict",
    "predict_dataloader": "predict",
    "test_dataloader": "test",
}  # hooks, as they are tried


class Loaders:
    """Finds the loaders of targets and train set, each when it is needed."""

    def __init__(
        self,
        trainer: Trainer,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        dataloaders: Any,
        fitted: DataLoader[Any] | None,
    ) -> None:
        self._trainer = trainer
        self._owners = [owner for owner in (datamodule, model) if owner is not None]
        self._dataloaders = dataloaders
        self._train = fitted
        self._set_ups: set[tuple[int, str]] = set()

    def targets(self) -> DataLoader[Any]:
        """Return the loader of the targets."""
        remedy = "Other targets are passed with trainer.attribute(dataloaders=...)."
        if self._dataloaders is not None:
            loader = check_loader(self._dataloaders, "dataloaders", "")
            check_limit(self._trainer, "limit_predict_batches", loader)
            return loader
        for owner in self._owners:
            for hook, stage in _STAGES.items():
                if is_overridden(hook, owner):
                    loader = check_loader(self._request(owner, hook, stage), hook, remedy)
                    check_limit(self._trainer, f"limit_{stage}_batches", loader)
                    return loader
        raise framework_of(self._trainer).MisconfigurationException(
            "No targets to attribute: no dataloaders were passed, and neither attribute_dataloader, predict_dataloader"
            f" nor test_dataloader is defined in {' or '.join(type(owner).__name__ for owner in self._owners)}."
            " Call trainer.attribute(dataloaders=DataLoader(...))."
        )

    def train_if_defined(self) -> DataLoader[Any] | None:
        """Return the loader of the train set, that of the last ``fit`` if known; None if there is none."""
        for hook in ("featurize_dataloader", "train_dataloader"):
            for owner in self._owners:
                if self._train is None and is_overridden(hook, owner):
                    remedy = TRAIN_REMEDY if hook == "train_dataloader" else ""
                    self._train = check_loader(self._request(owner, hook, "fit"), hook, remedy)
        return self._train

    def train(self) -> DataLoader[Any]:
        """Return the loader of the train set."""
        loader = self.train_if_defined()
        if loader is not None:
            return loader
        raise framework_of(self._trainer).MisconfigurationException(
            "There is no train set: neither featurize_dataloader nor train_dataloader is defined in"
            f" {' or '.join(type(owner).__name__ for owner in self._owners)}. Pass datamodule=..."
        )

    def set_up(self, stage: str) -> None:
        """Prepare datamodule and module, then set both up, unless that is done."""
        for owner in self._owners:
            self._set_up(owner, stage)

    def _request(self, owner: Any, hook: str, stage: str) -> Any:
        """Call a loader hook of a datamodule or module, after preparing and setting it up."""
        self._set_up(owner, stage)
        return getattr(owner, hook)()

    def _set_up(self, owner: Any, stage: str) -> None:
        """Set up a datamodule or module for a stage; before, prepare both, once for every machine as in ``fit``."""
        if not self._set_ups:
            for each in self._owners:
                if self._trainer.local_rank == 0 and (each.prepare_data_per_node or self._trainer.node_rank == 0):
                    each.prepare_data()
            self._trainer.strategy.barrier()
        if (id(owner), stage) not in self._set_ups:
            owner.setup(stage)
            self._set_ups.add((id(owner), stage))


TRAIN_REMEDY = (
    "If training needs this loader, define featurize_dataloader() in the LightningDataModule or LightningModule:"
    " attribution reads the train set from there."
)


def train_loader_of_fit(trainer: Trainer, module: LightningModule) -> DataLoader[Any]:
    """Return the loader of the train set during ``fit``: ``featurize_dataloader()``, or else that of training."""
    for owner in (trainer.datamodule, module):
        hook: Any = getattr(owner, "featurize_dataloader", None)
        if hook is not None:
            loader = check_loader(hook(), "featurize_dataloader", "")
            break
    else:
        loader = check_loader(trainer.train_dataloader, "train_dataloader", TRAIN_REMEDY)
    if not trainer.fast_dev_run:
        check_limit(trainer, "limit_train_batches", loader)
    return loader


def check_limit(trainer: Trainer, name: str, loader: DataLoader[Any]) -> None:
    """Raise if the Trainer's setting ``name``, a ``limit_*_batches``, leaves out examples of ``loader``."""
    limit = getattr(trainer, name)
    if limit < 1.0 if isinstance(limit, float) else limit < len(loader):
        raise framework_of(trainer).MisconfigurationException(
            f"Trainer({name}={limit}) leaves examples out, while attribution covers all {len(loader)} batches. Remove"
            " the limit (overfit_batches sets one too), or give the loader a torch.utils.data.Subset of the examples"
            " to attribute."
        )
