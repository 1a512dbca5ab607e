"""The curvature of a checkpoint: estimated once, from labels drawn for as many examples as `Preconditioner` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_trak.curvature import Curvature, Eigenvalues, Preconditioner, SecondMoments, Whitening, rescaling
from lightning_trak.data.batch import with_more
from lightning_trak.data.identity import sampled_rows
from lightning_trak.gradients import Engine, ModelFunction, Sink
from lightning_trak.gradients.engine import run_prepared
from lightning_trak.influence import TrainingTime, whitening_damping
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.files import Damaged
from lightning_trak.store.weights import Weights, copy_of_weights
from lightning_trak.tasks.checks import check_finite
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop
from lightning_trak.trainer.featurizing.reading import ExampleReader

_AT_ONCE, _AT_ONCE_ON_GPU = 2**25, 2**29  # entries of whitened gradients; more take no less time on a CPU
FEW = 4  # examples of which curvature is estimated to measure how long that takes


def whitened_at_once(dimension: int, device: torch.device) -> int:
    """Return how many examples are whitened at a time, at most: their gradients, (b, p), are dense."""
    return max(1, (_AT_ONCE_ON_GPU if device.type == "cuda" else _AT_ONCE) // dimension)


def draws_anything(reader: ExampleReader) -> bool:
    """Say whether the module draws a label for the first example: of two classes, its output tells all."""
    with reader.at(copy_of_weights(reader.module)) as function:
        return _drawn_labels(function, reader.read_once([0]), [0], [0]) is not None


def check_drawn(function: ModelFunction, batch: Any, size: int) -> None:
    """Raise a ValueError if no label is left to draw for the first examples, a batch of that size."""
    if _drawn_labels(function, batch, range(size), [0] * size) is None:
        raise ValueError(
            f"preconditioner='kronecker', but the output of {type(function.module).__name__} tells all, as for two"
            " classes or a single number: no label is left to draw. Leave preconditioner out of TRAKCallback."
        )


def _drawn_labels(function: ModelFunction, batch: Any, rows: Sequence[int], seeds: Sequence[int]) -> Any:
    """Draw labels from the predictions for training examples, by a seed for each; None if none are left to draw."""
    with torch.no_grad():
        try:
            return function.call(function.module.draw_labels, batch, seeds)
        except ValueError:
            check_finite("model_output", function.of("model_output").output(batch), "train", rows)
            raise


def whitening_at(
    loop: FeaturizationLoop, entry: CheckpointEntry, weights: Weights, description: str = ""
) -> Whitening | None:
    """Return the whitening at a checkpoint; None without a preconditioner. Its curvature is estimated once."""
    if loop.preconditioner is None:
        return None
    if not entry.whitening_notes:
        with entry.locked("whitening"):
            if not entry.whitening_notes:  # else another process has estimated it in the meantime
                own = loop.preconditioner
                curvature = estimate_curvature(loop, own, weights, entry.digest, description)
                means = curvature.means
                damping = whitening_damping(means, own.damping, _trainings([entry], own))
                arrays = {name: value.cpu().numpy() for name, value in curvature.tensors().items()}
                entry.write_whitening(arrays, {"eigenvalues": means, "damping": damping})
    return Whitening(_curvature_of(entry).to(loop.reader.device), loop.reader.sizes, entry.whitening_notes["damping"])


def _curvature_of(entry: CheckpointEntry) -> Curvature:
    """Return the curvature that gradients are whitened by at a checkpoint, from the store."""
    return Curvature.from_tensors({name: torch.from_numpy(array) for name, array in entry.read_whitening().items()})


def rescaled(entries: Sequence[CheckpointEntry], own: Preconditioner, sizes: Mapping[str, int]) -> list[Tensor | None]:
    """Return by what to multiply whitened features at each checkpoint, (p,); None if nothing is to be done.

    λ may be another one than when a checkpoint was featurized: if the user gives another, and because nobody knew how
    long training would go on. One rule holds for all checkpoints.
    """
    trainings = _trainings(entries, own)
    scales: list[Tensor | None] = []
    for entry in entries:
        former = entry.whitening_notes
        if not former:
            raise Damaged(entry.whitening_path, "it is missing")
        damping = whitening_damping(former["eigenvalues"], own.damping, trainings)
        if damping == former["damping"]:
            scales.append(None)
        else:
            scales.append(rescaling(_curvature_of(entry), sizes, former["damping"], damping))
    return scales


def _trainings(entries: Sequence[CheckpointEntry], own: Preconditioner) -> list[TrainingTime]:
    """Return the training times that λ follows from; none if one is unknown."""
    times = [entry.meta.get("training_time") for entry in entries] if own.rest else [None]
    return [] if None in times else [TrainingTime(**time) for time in times if time]


def estimate_curvature(
    loop: FeaturizationLoop, own: Preconditioner, weights: Weights, digest: str, description: str
) -> Curvature:
    """Estimate the curvature of the loss at a checkpoint, in two passes over some training examples."""
    few, rows = (sampled_rows(loop.reader.size, size) for size in (own.basis_examples, own.examples))
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
        labels = _drawn_labels(function, batch, rows, [2 * row + seed for row in rows])
        loss, drawn = function.of("drawn_loss"), with_more(batch, labels)

        def send() -> None:
            with batch_of(size) as sink:
                engine(loss, drawn, size, sink)

        run_prepared(engine, loss, drawn, size, send)

    return add


def trial_curvature(
    loop: FeaturizationLoop, own: Preconditioner, weights: Weights, digest: str, examples: int = FEW
) -> Curvature:
    """Estimate the curvature from a few examples, to measure how long that takes, and whitening with it."""
    small = replace(own, basis_examples=FEW, examples=examples)
    return estimate_curvature(loop, small, weights, digest, "Measuring")


def trial_whitening(loop: FeaturizationLoop, own: Preconditioner, curvature: Curvature) -> Whitening:
    """Return the whitening by a curvature that is not in the store."""
    damping = whitening_damping(curvature.means, own.damping, [])
    return Whitening(curvature.to(loop.reader.device), loop.reader.sizes, damping)
