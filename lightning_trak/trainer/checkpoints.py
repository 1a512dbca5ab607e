"""The steps at one checkpoint of the store: add it, featurize train set and targets, check stored features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.data.identity import sampled_rows
from lightning_trak.features.largest import SparseRows, matrix_of
from lightning_trak.features.sparse_matrix import SparseMatrix
from lightning_trak.influence import SUMS_VERSION, Estimator, GaussNewton, TrainFeatures, TrainingTime
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.files import explained_os_errors
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import Weights, load_weights, save_weights
from lightning_trak.trainer.featurization import FeatureBlock, FeaturizationLoop
from lightning_trak.trainer.framework import rank_zero_warn
from lightning_trak.trainer.whitening import READ_ROWS, record_of, same_features, stored_form, whitening_at

Array = npt.NDArray[Any]
_CHECKED = 8  # stored rows that are computed again


def add_checkpoint(store: FeatureStore, digest: str, weights: Weights, meta: dict[str, Any]) -> None:
    """Put weights into the store. The file comes first, so that no entry lacks its weights."""
    if digest in store:
        store[digest].supplement(meta)
        return
    folder = store.folder(digest)
    with explained_os_errors(store.dirpath):
        save_weights(weights, folder / "weights.pt")
    store.add(digest, meta)


def pool_of(store: FeatureStore, digests: Sequence[str] | None = None) -> str:
    """Say how many checkpoints of the store are averaged over (by default all), and from how many runs."""
    chosen = store.digests if digests is None else digests
    runs = {store[digest].meta.get("run") for digest in chosen}
    known = len(runs - {None})
    sources = [f"{known} run{'s' * (known > 1)}"] * (known > 0) + ["files"] * (None in runs)
    return f"{len(chosen)} of {len(store)} checkpoints in '{store.dirpath}', from {' and '.join(sources)}"


@contextmanager
def naming(entry: CheckpointEntry, *, can_leave_out: bool = True) -> Iterator[None]:
    """Add to a ValueError at which checkpoint it was raised and, if that helps, how to leave the checkpoint out."""
    try:
        yield
    except ValueError as error:
        remedy = f" To leave this checkpoint out, delete '{entry.path}'." if can_leave_out else ""
        raise ValueError(
            f"At checkpoint {entry.digest} (file '{entry.meta.get('file')}', step {entry.meta.get('global_step')}):"
            f" {str(error).rstrip('.')}.{remedy}"
        ) from error


def featurize_checkpoint(loop: FeaturizationLoop, entry: CheckpointEntry, number: str) -> None:
    """Compute the missing train features of a checkpoint, and mark it as complete."""
    weights = load_weights(entry.weights_path, entry.digest)
    entry.allocate(loop.dimension, record_of(loop))
    where = f" (epoch {entry.meta['epoch']}, step {entry.meta['global_step']})" if "epoch" in entry.meta else ""
    description = f"Featurizing checkpoint {number}{where}"
    rows = entry.missing_rows().tolist()

    def receive(batch_rows: Sequence[int], block: FeatureBlock) -> None:
        entry.write(batch_rows, stored_form(loop, block.features), block.loss_grad, block.curvature)

    with naming(entry):
        whitening = whitening_at(loop, entry, weights, f"Curvature of checkpoint {number}{where}")
        projection = loop.run(weights, entry.digest, rows, receive, description, whitening)
    if projection is not None and rows:
        if len(rows) == loop.size:  # after an interruption, it knows the last rows only
            entry.supplement({"loss_explained": projection.explained()})
        loop.report(projection)
    entry.supplement({"logistic": loop.logistic, "n_trainable": loop.n_trainable})
    entry.finish()


def check_features(loop: FeaturizationLoop, entry: CheckpointEntry) -> None:
    """Compute a few stored rows again: ``model_output`` or the data may have changed, which the store cannot know.

    Raises:
        ValueError: if they differ from the stored rows.
    """
    written = entry.written_rows()
    rows = written[sampled_rows(len(written), _CHECKED)].tolist()

    def compare(batch_rows: Sequence[int], block: FeatureBlock) -> None:
        news = (stored_form(loop, block.features), block.loss_grad, block.curvature)
        for name, new in zip(("features", "loss_grad", "curvature"), news, strict=True):
            if not same_features(new, entry.rows(name, batch_rows)):
                if entry.complete:
                    for _ in entry.verified(name).blocks(READ_ROWS):
                        pass  # damage is an error of its own, after the last row
                raise ValueError(
                    f"The stored {name} of train rows {batch_rows} are not those that the model and the data give now:"
                    " model_output, the loss, the collate function or a batch hook has changed since. Restore it, or"
                    " use another dirpath for TRAKCallback."
                )

    with naming(entry, can_leave_out=False):  # the cause affects all checkpoints
        weights = load_weights(entry.weights_path, entry.digest)
        whitening = whitening_at(loop, entry, weights)
        loop.run(weights, entry.digest, rows, compare, "Checking the store", whitening)


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
    training = entry.meta.get("training_time")
    features: Any = entry.verified("features")
    return TrainFeatures(
        features if dimension is None else SparseRows(features, dimension, scales),
        entry.verified("loss_grad").read(),
        entry.verified("curvature").read(),
        training_time=None if training is None else TrainingTime(**training),
        logistic=entry.meta.get("logistic", False),
        n_trainable=entry.meta.get("n_trainable") or 0,
        squares=None if dimension is None else np.array(entry.features["squares"]),
        whitened_by_rest=rest,
    )


def sums_of(entry: CheckpointEntry, estimator: Estimator, train: TrainFeatures) -> GaussNewton | None:
    """Return the estimator's sums over the train set at a checkpoint; the store caches them.

    None for whitened features, which need none.
    """
    if train.squares is not None:
        return None
    options = estimator.options
    key: dict[str, Any] = {"version": SUMS_VERSION, "estimator": options.estimator, "curvature": options.curvature}
    key["temperature"] = estimator.temperature
    kept = entry.read_sums(key)
    sums = None if kept is None else GaussNewton.from_arrays(kept, estimator.device)
    if sums is None or not estimator.suffices(train, sums):
        sums = estimator.accumulate(train)
        try:
            entry.write_sums(key, sums.arrays())
        except OSError as error:  # a full disk, or a read-only store
            rank_zero_warn(f"Sums over the train set could not be stored and will be computed again: {error}")
    return sums


def featurize_targets(
    loop: FeaturizationLoop, entry: CheckpointEntry, number: str
) -> tuple[Tensor | SparseMatrix, Tensor]:
    """Return the targets' features at a checkpoint, (m, k), of whitened ones the largest entries; and f, (m,)."""
    record = record_of(loop)
    features: Array = np.zeros(loop.size, record) if record else np.zeros((loop.size, loop.dimension), np.float32)

    outputs: Array = np.zeros(loop.size, np.float32)

    def receive(rows: Sequence[int], block: FeatureBlock) -> None:
        features[rows], outputs[rows] = stored_form(loop, block.features), block.outputs

    weights = load_weights(entry.weights_path, entry.digest)
    with naming(entry, can_leave_out=False):  # the cause is in the targets
        whitening = whitening_at(loop, entry, weights)
        description = f"Featurizing targets at checkpoint {number}"
        loop.run(weights, entry.digest, range(loop.size), receive, description, whitening)
    return (torch.from_numpy(features) if record is None else matrix_of(features)), torch.from_numpy(outputs)
