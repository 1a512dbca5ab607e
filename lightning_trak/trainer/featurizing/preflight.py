"""Preflight: a few examples are tried, so that errors come now and not after hours of training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from lightning_trak.features.loss_projection import PER_SAMPLE_LOSS
from lightning_trak.gradients import Engine, EngineUnsuitable, ModelFunction, Selector, numbered_gradient
from lightning_trak.store.weights import Weights
from lightning_trak.tasks.checks import (
    check_dependent,
    check_finite,
    check_independent,
    check_size,
    check_terms,
    check_unchanged,
    versions_of,
)
from lightning_trak.trainer.featurizing.curvature import check_drawn
from lightning_trak.trainer.featurizing.featurization import FEW, FeaturizationLoop
from lightning_trak.trainer.featurizing.reading import ExampleReader

_TRIED = 8  # examples tried before training
_FEWER = 2  # targets tried: gradients were checked on the train set


def preflight(loop: FeaturizationLoop, weights: Weights, digest: str = "", *, thorough: bool = False) -> float:
    """Try a few examples at a checkpoint.

    Args:
        loop: will featurize the examples.
        weights: of any checkpoint; the module may change them.
        digest: their digest, if they will be used to featurize.
        thorough: whether to try more examples, and to check all outputs of the first batch.

    Returns:
        Seconds for an example: an upper bound, from a few examples.

    Raises:
        ValueError: if outputs have the wrong shape, do not depend on the parameters, depend on the rest of the batch,
            or are not finite; or if the loss terms do not belong together.
    """
    reader = loop.reader
    with reader.at(weights) as function:
        train = reader.examples == "train"
        rows = range(min(reader.largest, _TRIED if thorough else FEW if train else _FEWER))
        alone = rows if thorough else sorted({rows[0], rows[-1]}) if train else rows[-1:]
        batch = reader.read_twice(rows)
        versions = versions_of(batch)
        start = perf_counter()
        outputs = _try(reader, function, batch, alone, len(rows))
        seconds = (perf_counter() - start) / len(rows)
        check_unchanged(reader.module, batch, versions)
        if not train:
            return seconds
        if loop.preconditioner is not None:
            check_drawn(function, batch, len(rows))
        if loop.loss_terms.need_projection:
            losses = function.of(PER_SAMPLE_LOSS)
            _try(reader, losses, batch, alone, len(rows))
            if reader.selector.gradients != "auto":  # with "auto", some engine can
                Selector(reader.selector.gradients).choose(losses, batch, len(rows))
        else:
            check_terms(*loop.loss_terms(function.call, batch, outputs), reader.examples, rows)
        engine = loop.prepare(function, digest, batch)
        if thorough:
            _try_whole_batch(reader, function, engine)
        return seconds


def _try(reader: ExampleReader, function: ModelFunction, batch: Any, alone: Sequence[int], size: int) -> Tensor:
    """Evaluate a method on the first examples, check that it can be attributed, and return its outputs.

    The rows ``alone`` must have the same output in a batch of their own.
    """
    method, examples = function.method, reader.examples
    if examples == "train":
        with function.observing():
            _, outputs, gradients = numbered_gradient(function, batch, size)
        dependent = bool(gradients)
    else:
        outputs = function.observe(batch)
        check_size(reader.module, outputs, size, method)
        dependent, outputs = outputs.requires_grad, outputs.detach()
    check_dependent(reader.module, dependent, len(reader.parameters), method)
    check_finite(method, outputs, examples, range(size))
    if reader.selector.gradients != "loop" and reader.repeatable:
        for row in alone:
            by_itself = function.observe(reader.read_once([row])).detach()
            what, together = f"{type(reader.module).__name__}.{method}", outputs[row : row + 1]
            check_independent(what, together, by_itself, function.tolerance, examples, row)
    return outputs


def _try_whole_batch(reader: ExampleReader, function: ModelFunction, engine: Engine) -> None:
    """Check all outputs and gradients of the first batch, as far as memory allows."""
    rows = range(engine.batch_size or reader.batch_size)
    with suppress(torch.OutOfMemoryError):
        batch = reader.read_once(rows)
        check_finite("model_output", function.output(batch).detach(), reader.examples, rows)
        try:
            reader.selector.check(function, engine, batch, len(rows))
        except EngineUnsuitable as error:
            reader.selector.reject(engine, error)
