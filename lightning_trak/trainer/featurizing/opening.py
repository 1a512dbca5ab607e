"""Opens the store of a model and a train set, makes it, or lets it grow with the train set."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Subset

from lightning_trak.data.identity import fingerprint
from lightning_trak.store.remote import AnyPath
from lightning_trak.store.store import FeatureStore
from lightning_trak.trainer.featurizing.plan import Plan, Settings
from lightning_trak.trainer.host.framework import LightningModule, Trainer, framework_of, rank_zero_info
from lightning_trak.trainer.host.loaders import Loaders
from lightning_trak.trainer.host.reports import Reports


def open_store(
    path: AnyPath,
    settings: Settings,
    reports: Reports,
    trainer: Trainer,
    model: LightningModule,
    loaders: Loaders,
    *,
    may_grow: bool = True,
) -> tuple[FeatureStore, Plan]:
    """Open the store; check that it is of this model and data."""
    if trainer.fast_dev_run and not (path / "manifest.json").exists():
        raise framework_of(trainer).MisconfigurationException(
            "This Trainer ran with fast_dev_run, which saves no checkpoint, so there is nothing to attribute. Fit"
            " without fast_dev_run, or pass checkpoint files with ckpt_path=[...]."
        )
    store = FeatureStore(path)
    plan = Plan(settings, reports, model, store.manifest)
    store.check(plan.identity)
    loader = loaders.train_if_defined()
    if loader is not None:  # also without anything to featurize: rows must be of this data set
        store = fitting_store(path, plan, loader, may_grow=may_grow)
    return store, plan


def fitting_store(
    path: AnyPath, plan: Plan, loader: DataLoader[Any], seconds: float | None = None, *, may_grow: bool = True
) -> FeatureStore:
    """Open the store of a plan and a train set, or make it; it takes examples that were added to its own.

    The ``seconds`` that an example takes are for the size of chunks. Without ``may_grow``, a store of fewer examples is
    returned as it is.

    Raises:
        ValueError: if it is a store of another plan or train set.
    """
    manifest = plan.manifest(loader, seconds)
    if not (path / "manifest.json").exists():
        return FeatureStore.create(path, manifest)
    store = FeatureStore(path)
    if store.n_train < manifest["n_train"] and "data" in store.manifest:
        store.check(plan.identity)
        first = fingerprint(Subset(loader.dataset, range(store.n_train)))
        if first["data"] == store.manifest["data"]:
            if not may_grow:
                return store
            former, now = store.n_train, manifest["n_train"]
            store = store.grown(manifest)
            store.check(manifest)  # another process may have added other examples
            rank_zero_info(
                f"TRAKCallback: the train set has {now} examples, of which the store '{path}' knew the first {former}:"
                f" their features stay, and those of the other {now - former} are computed at each checkpoint."
            )
            return store
    store.check(manifest)
    return store
