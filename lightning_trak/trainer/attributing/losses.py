"""The losses of examples at checkpoints, from stored outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients import ModelFunction
from lightning_trak.store.weights import Weights
from lightning_trak.tasks.checks import check_finite
from lightning_trak.tasks.loss_terms import LossTerms
from lightning_trak.trainer.attributing.job import Job
from lightning_trak.trainer.featurizing.reading import ExampleReader


def typical_losses(job: Job, reader: ExampleReader) -> Tensor:
    """Return half of the last checkpoint's loss of each training example, and half of the average, (n,).

    Of several runs, the last checkpoints are averaged.
    """
    losses = _at_checkpoints(job, reader)
    runs = {entry.meta.get("run") or entry.digest: number for number, entry in enumerate(job.entries)}
    return (losses.mean(0) + losses[list(runs.values())].mean(0)) / 2


def _at_checkpoints(job: Job, reader: ExampleReader) -> Tensor:
    """Return the losses at each checkpoint, (c, n).

    They follow from the stored outputs, so the model runs only if it defines a loss that is no function of its output.
    Where it defines Q alone, and no loss, the square of Q stands in.
    """
    terms = LossTerms(job.model)
    if not terms.loss_known:
        return _stored(job, "loss_grad").square()
    outputs = _stored(job, "outputs")
    if not terms.loss_needs_model:
        return _losses(reader, job.entries[-1].weights(), outputs, "Computing losses")
    found, count = [], len(job.entries)
    for number, (entry, known) in enumerate(zip(job.entries, outputs, strict=True), 1):
        found.append(_losses(reader, entry.weights(), known[None], f"Losses at checkpoint {number}/{count}"))
    return torch.cat(found)


def _stored(job: Job, name: str) -> Tensor:
    """Return what is stored of each training example at each checkpoint, (c, n)."""
    return torch.stack([torch.from_numpy(entry.train.column(name)).float() for entry in job.entries])


def _losses(reader: ExampleReader, weights: Weights, outputs: Tensor, description: str) -> Tensor:
    """Return the losses of outputs at several checkpoints, (c, n); weights count only if the loss needs the model."""
    terms = LossTerms(reader.module)

    def losses(call: Callable[..., Any], batch: Any, known: Tensor, rows: Sequence[int]) -> Tensor:
        found = torch.stack([terms.losses(call, batch, one).float() for one in known])
        check_finite("the loss", found.sum(0), reader.examples, rows)
        return found

    return _of_outputs(reader, weights, outputs, losses, description)


def loss_grads(reader: ExampleReader, weights: Weights, outputs: Tensor) -> Tensor:
    """Return Q of the model outputs of targets, (m,), at a checkpoint's weights."""
    terms = LossTerms(reader.module)

    def gradients(call: Callable[..., Any], batch: Any, known: Tensor, _: Sequence[int]) -> Tensor:
        return terms(call, batch, known)[0]

    return _of_outputs(reader, weights, outputs, gradients, "Losses of targets")


def _of_outputs(
    reader: ExampleReader,
    weights: Weights,
    outputs: Tensor,
    compute: Callable[[Callable[..., Any], Any, Tensor, Sequence[int]], Tensor],
    description: str,
) -> Tensor:
    """Return what ``compute`` returns of (call, batch, outputs of the batch, rows), batch by batch."""
    found = torch.zeros(outputs.shape)

    def work(function: ModelFunction, rows: Sequence[int], batch: Any) -> None:
        own = slice(rows[0], rows[-1] + 1)
        found[..., own] = compute(function.call, batch, outputs[..., own].to(reader.device), rows).float().cpu()

    reader.without_gradients(weights, work, description)
    return found
