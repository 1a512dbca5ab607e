"""Which checkpoints ``ckpt_path`` means: files, or checkpoints of the store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning_trak.gradients.function import check_fit
from lightning_trak.influence import TrainingTime
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import read_checkpoint, weights_digest, weights_in
from lightning_trak.trainer.fit.checkpoint_files import whole_path
from lightning_trak.trainer.host.framework import Trainer, framework_of

CkptPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


def files_of(trainer: Trainer, ckpt_path: CkptPath) -> list[str | os.PathLike[str]] | None:
    """Return the checkpoint files that ``ckpt_path`` names; None if it names checkpoints of the store."""
    if ckpt_path is None or ckpt_path == "last":
        return None
    if ckpt_path == "best":
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not best:
            raise framework_of(trainer).MisconfigurationException(
                "ckpt_path='best', but this trainer has no ModelCheckpoint that saved a best model. Pass its path."
            )
        ckpt_path = best
    paths = [ckpt_path] if isinstance(ckpt_path, (str, os.PathLike)) else list(ckpt_path)
    if not paths:
        raise ValueError("ckpt_path is an empty list. Pass at least one checkpoint file, or None for all in the store.")
    return paths


def of_store(trainer: Trainer, store: FeatureStore, ckpt_path: CkptPath, last: str | None) -> list[str]:
    """Return the digests of all checkpoints of the store.

    With ``"last"`` there is one: ``last`` if the store has it, else the newest.
    """
    digests = store.digests
    if not digests:
        raise framework_of(trainer).MisconfigurationException(
            f"The store '{store.dirpath}' has no checkpoints. Train with a TRAKCallback and checkpointing on (not"
            " with fast_dev_run), or pass checkpoint files with ckpt_path=[...]."
        )
    if ckpt_path is None:
        return digests
    return [last] if last is not None and last in store else digests[-1:]


def of_files(trainer: Trainer, store: FeatureStore, paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Put files into the store; return the digests of their weights."""
    digests = []
    for path in paths:
        checkpoint = read_checkpoint(path)
        weights, training = weights_in(checkpoint, path), TrainingTime.of_checkpoint(checkpoint)
        digest = weights_digest(weights)
        if digest not in digests:
            digests.append(digest)
        check_fit(trainer.lightning_module, weights)
        meta: dict[str, Any] = {"file": os.path.basename(path), "path": whole_path(path)}
        meta["training_time"] = training and asdict(training)
        store.add(digest, meta, weights)
    return digests
