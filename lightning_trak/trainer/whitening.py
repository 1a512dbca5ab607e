"""Whitening at a checkpoint: its curvature, estimated once, and what is stored of whitened gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.curvature import Curvature, Eigenvalues, SecondMoments, Whitening, rescaling
from lightning_trak.data.batch import with_more
from lightning_trak.data.identity import sampled_rows
from lightning_trak.features.largest import difference, largest_entries, record_type
from lightning_trak.gradients import Engine, ModelFunction, Sink
from lightning_trak.gradients.engine import run_prepared
from lightning_trak.influence import TrainingTime, whitening_strength
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.files import explained_os_errors
from lightning_trak.store.weights import Weights, load_weights, save_weights, weights_digest
from lightning_trak.trainer.featurization import FeaturizationLoop

Array = npt.NDArray[Any]
_FILE = "curvature.pt"  # bases and eigenvalues, in the folder of a checkpoint


def stored_form(loop: FeaturizationLoop, features: Tensor) -> Array:
    """Return features as they are kept: as they are, or the largest entries of whitened ones."""
    kept = loop.entries
    return features.cpu().numpy() if kept is None else largest_entries(features, kept)


def record_of(loop: FeaturizationLoop) -> np.dtype[Any] | None:
    """Return the type of an example's record of largest entries; None if features are kept as they are."""
    return None if loop.entries is None else record_type(loop.entries, loop.dimension)


def same_features(new: Array, stored: Array) -> bool:
    """Say whether features, or Q or w, are the same up to rounding."""
    if new.dtype.names is not None:
        return difference(new, stored) <= 0.05
    return not np.linalg.norm(new - stored) > 0.05 * np.linalg.norm(stored) + 1e-3  # damage by NaN is told later


def whitening_at(
    loop: FeaturizationLoop, entry: CheckpointEntry, weights: Weights, description: str = ""
) -> Whitening | None:
    """Return the whitening at a checkpoint; None without a preconditioner. Its curvature is estimated once.

    Args:
        loop: reads the train set, unless the curvature is in the store.
        entry: the checkpoint.
        weights: the checkpoint's weights.
        description: what the progress bar says while the curvature is estimated.
    """
    if loop.preconditioner is None:
        return None
    path, digest = entry.path / _FILE, entry.meta.get("curvature")
    if digest is not None:
        curvature = Curvature.from_tensors(load_weights(path, digest))
    else:
        time = entry.meta.get("training_time")
        strength = whitening_strength([TrainingTime(**time)]) if time and loop.preconditioner.damping is None else None
        curvature = replace(estimate_curvature(loop, weights, entry.digest, description), strength=strength)
        tensors = curvature.tensors()
        with explained_os_errors(entry.path):
            save_weights(tensors, path)
        entry.supplement({"curvature": weights_digest(tensors)})
    return Whitening(curvature.to(loop.device), loop.sizes, loop.preconditioner.damping or 1.0)


def rescaled(entry: CheckpointEntry, sizes: Mapping[str, int], strength: float | None) -> Tensor | None:
    """Return by what to multiply whitened features so that λ is ``strength``, (p,); None if nothing is to be done.

    When a checkpoint is featurized, nobody knows how long training will go on.
    """
    digest = entry.meta.get("curvature")
    if strength is None or digest is None:
        return None
    curvature = Curvature.from_tensors(load_weights(entry.path / _FILE, digest))
    return None if curvature.strength in (None, strength) else rescaling(curvature, sizes, strength)


def estimate_curvature(loop: FeaturizationLoop, weights: Weights, digest: str, description: str) -> Curvature:
    """Estimate the curvature of the loss at a checkpoint, in two passes over some training examples."""
    own = loop.preconditioner
    assert own is not None
    few, rows = (sampled_rows(loop.size, size) for size in (own.basis_examples, own.examples))
    moments = SecondMoments()
    add = _adding(moments.batch, seed=0)
    loop.each_batch(weights, digest, few, add, f"{description}: factors")
    eigenvalues = Eigenvalues(moments.bases())
    add = _adding(eigenvalues.batch, seed=1)
    loop.each_batch(weights, digest, rows, add, f"{description}: eigenvalues")
    return eigenvalues.curvature()


def _adding(
    batch_of: Callable[[int], AbstractContextManager[Sink]], seed: int
) -> Callable[[ModelFunction, Engine, Sequence[int], Any], None]:
    """Return what sends the gradients of a batch's loss, with drawn labels, to the sink of ``batch_of``."""

    def add(function: ModelFunction, engine: Engine, rows: Sequence[int], batch: Any) -> None:
        size = len(rows)
        with torch.no_grad():
            labels = function.call(function.module.draw_labels, batch, [2 * row + seed for row in rows])
        loss, drawn = function.of("drawn_loss"), with_more(batch, labels)

        def send() -> None:
            with batch_of(size) as sink:
                engine(loss, drawn, size, sink)

        run_prepared(engine, loss, drawn, size, send)

    return add
