"""The train set's features at a checkpoint, as the store has them and the estimator takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from lightning_trak.features.largest import ENTRIES, SparseRows, matrix_of
from lightning_trak.features.stored import dense
from lightning_trak.influence import SUMS_VERSION, Estimator, GaussNewton, TrainFeatures, TrainingTime, is_logistic
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.chunks import Chunks, Reader
from lightning_trak.trainer.host.framework import rank_zero_warn

_READ_ROWS = 4096  # of stored features at once


class StoredFeatures:
    """Φ of a checkpoint, (n, k), of which parts are read from its chunks."""

    def __init__(self, chunks: Chunks) -> None:
        first = chunks.read(chunks.all()[0])
        self.shape = (chunks.n, first["features"].shape[1])
        self._read = Reader(chunks, [name for name in ("features", "scale") if name in first])

    def __getitem__(self, rows: slice) -> Tensor:
        """Return some rows."""
        return dense(self._read(range(*rows.indices(self.shape[0]))))


def train_features(
    entry: CheckpointEntry, dimension: int | None, *, rest: bool = False, scales: Tensor | None = None
) -> TrainFeatures:
    """Return the train set's features at a complete checkpoint; Φ is verified whenever it is read.

    Args:
        entry: the checkpoint.
        dimension: p, if they are whitened: then each has its largest entries alone.
        rest: whether they are whitened by what the outputs leave open.
        scales: to multiply their entries with, (p,); None for 1.
    """
    train, training = entry.train, entry.meta.get("training_time")
    terms = ["outputs", "loss_grad", "curvature"]
    small = train.columns(terms if dimension is None else [*terms, "squares"])
    logistic = entry.meta.get("logistic", False)
    return TrainFeatures(
        StoredFeatures(train)
        if dimension is None
        else SparseRows(Reader(train, ENTRIES), (train.n, dimension), scales),
        small["loss_grad"],
        small["curvature"],
        training_time=None if training is None else TrainingTime(**training),
        logistic=logistic and is_logistic(*(torch.from_numpy(small[name]) for name in terms)),
        n_trainable=entry.meta.get("n_trainable") or 0,
        squares=small.get("squares"),
        whitened_by_rest=rest,
    )


def with_own_squares(entry: CheckpointEntry, train: TrainFeatures, scales: Tensor | None) -> TrainFeatures:
    """Return the train set with ‖φ‖² of its features as they are scaled now, (p,); see `Job.scales`.

    The entries that are not stored are taken to change as the stored ones of their example do.
    """
    if scales is None or train.whitened_by_rest:
        return train
    tiny = torch.finfo(torch.float32).tiny
    blocks = (matrix_of(block) for block in entry.train.blocks(ENTRIES, _READ_ROWS))
    ratios = [block.scaled(scales).squares() / block.squares().clamp(min=tiny) for block in blocks]
    return replace(train, squares=entry.train.column("squares") * torch.cat(ratios).numpy())


def sums_of(entry: CheckpointEntry, estimator: Estimator, train: TrainFeatures) -> GaussNewton | None:
    """Return the estimator's sums over the train set at a checkpoint; the store caches them.

    None for whitened features, which need none.
    """
    if train.squares is not None:
        return None
    options = estimator.options
    key: dict[str, Any] = {"version": SUMS_VERSION, "estimator": options.estimator, "curvature": options.curvature}
    key["temperature"] = estimator.temperature
    key["of"] = checksums(train)
    kept = entry.read_sums(key)
    sums = None if kept is None else GaussNewton.from_arrays(kept, estimator.device)
    if sums is None or not estimator.suffices(train, sums):
        sums = estimator.accumulate(train)
        try:
            entry.write_sums(key, sums.arrays())
        except OSError as error:  # a full disk, or a read-only store
            rank_zero_warn(f"Sums over the train set could not be stored and will be computed again: {error}")
    return sums


def checksums(train: TrainFeatures) -> list[int]:
    """Return those of Q and w, which depend on the temperature."""
    return [crc32(np.ascontiguousarray(numbers).data) for numbers in (train.loss_grad, train.curvature)]
