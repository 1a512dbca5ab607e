"""The featurization loop: a pass over examples like that of ``trainer.predict``, which turns them into features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.curvature import Preconditioner
from lightning_trak.features.featurizer import Featurizer
from lightning_trak.features.largest import Array
from lightning_trak.features.loss_projection import LossProjection
from lightning_trak.features.stored import StoredForm
from lightning_trak.gradients import Engine, LoopEngine, ModelFunction, Trial
from lightning_trak.gradients.memory import peak_bytes
from lightning_trak.projection import Projector, projection_key
from lightning_trak.store.weights import Weights
from lightning_trak.tasks.checks import check_finite, check_size, check_terms
from lightning_trak.tasks.loss_terms import LossTerms
from lightning_trak.trainer.featurizing.reading import ExampleReader
from lightning_trak.trainer.host.framework import stop_if_asked
from lightning_trak.trainer.host.progress import progress

FEW = 3  # examples that an engine is tried on: few models have an axis of this size


class Measured(NamedTuple):
    """What featurizing a batch took.

    Attributes:
        seconds: for each example.
        memory: bytes for the whole batch.
        features: of the batch, (b, k).
    """

    seconds: float
    memory: int
    features: Tensor


class FeaturizationLoop:
    """Turns the examples of a dataset into features, checkpoint by checkpoint.

    Args:
        reader: reads the examples.
        projector: the family of projections.
        preconditioner: how gradients are whitened; None if they are not.
        dtype: in which features are stored.
        seed: determines the projection, together with the checkpoint's digest.

    Attributes:
        reader: as given.
        preconditioner: as given.
        dimension: k, the number of features.
        loss_terms: Q and w of the examples.
    """

    def __init__(
        self,
        reader: ExampleReader,
        projector: Projector,
        preconditioner: Preconditioner | None,
        dtype: str,
        seed: int,
    ) -> None:
        self.reader, self.preconditioner = reader, preconditioner
        self._projector, self._dtype, self._seed = projector, dtype, seed
        self.dimension = projector.dimension(sum(reader.sizes.values()))
        self.loss_terms = LossTerms(reader.module)

    @property
    def form(self) -> StoredForm:
        """How features are stored."""
        own = self.preconditioner
        if own is None:
            return StoredForm(self.dimension, self._dtype)
        entries = own.entries if self.reader.examples == "train" else own.target_entries
        return StoredForm(self.dimension, entries=min(entries, self.dimension))

    def run(
        self,
        weights: Weights,
        digest: str,
        rows: Iterable[int],
        receive: Callable[[Sequence[int], dict[str, Array]], object],
        description: str,
        projector: Projector | None = None,
        total: int | None = None,
    ) -> LossProjection | None:
        """Featurize ``rows`` at one checkpoint.

        Args:
            weights: the checkpoint's weights.
            digest: their digest.
            rows: which examples, in this order; asked for when they are read.
            receive: takes rows and what the store keeps of them, arrays by name, batch by batch.
            description: what the progress bar says.
            projector: used instead of the loop's own, e.g. a `Whitening`.
            total: the number of rows, if they have no length.

        Returns:
            The projection that gave Q; None if Q needed none.
        """
        projection = self._projection()

        def featurize(function: ModelFunction, engine: Engine, batch_rows: Sequence[int], batch: Any) -> None:
            featurizer = self.featurizer(function, engine, digest, projector)
            features, numbers = self._featurize(featurizer, batch_rows, batch, projection)
            receive(batch_rows, self.form.arrays(features) | numbers)

        self.each_batch(weights, digest, rows, featurize, description, total)
        self._projector.forget()
        return projection

    def each_batch(
        self,
        weights: Weights,
        digest: str,
        rows: Iterable[int],
        work: Callable[[ModelFunction, Engine, Sequence[int], Any], object],
        description: str,
        total: int | None = None,
    ) -> None:
        """Call ``work`` with (function, engine, rows, batch) for each batch of ``rows``, at one checkpoint.

        After a failure of an engine or a shortage of memory, ``work`` is called again with the batch, or a part of it.
        """
        reader, count = self.reader, len(rows) if isinstance(rows, Sized) else total or 0
        with progress(reader.trainer, description, count) as advance, reader.at(weights) as function:

            def advancing(engine: Engine, batch_rows: Sequence[int], batch: Any) -> None:
                work(function, engine, batch_rows, batch)
                advance(len(batch_rows))
                stop_if_asked(reader.trainer)

            prepare = partial(self.prepare, function, digest)
            reader.selector.run(rows, reader.largest, reader.read, prepare, advancing, function)

    def featurizer(
        self, function: ModelFunction, engine: Engine, digest: str, projector: Projector | None = None
    ) -> Featurizer:
        """Return what turns batches into features at a checkpoint; see `run`."""
        return Featurizer(function, engine, projector or self._projector, projection_key(self._seed, digest))

    def prepare(self, function: ModelFunction, digest: str, first: Any = None) -> Engine:
        """Return the engine for a checkpoint, tried on a few examples: the batch ``first``, if it is as many."""
        reader = self.reader
        return reader.selector.prepare(function, digest, partial(self._trial, function, digest, first), reader.largest)

    def measured(self, weights: Weights, digest: str, projector: Projector | None = None) -> Measured:
        """Featurize the first batch twice; measure the second time."""
        reader = self.reader
        with reader.at(weights) as function:
            engine = self.prepare(function, digest)
            rows = range(engine.batch_size or reader.batch_size)
            start = perf_counter()
            batch = reader.read_once(rows)
            reading = (perf_counter() - start) / max(1, reader.loader.num_workers)

            def measure(engine: Engine) -> Measured:
                featurizer, projection = self.featurizer(function, engine, digest, projector), self._projection()
                memory = peak_bytes(lambda: self._featurize(featurizer, rows, batch, projection), reader.device)
                start = perf_counter()
                features, _ = self._featurize(featurizer, rows, batch, projection)
                self.form.arrays(features)
                computing = perf_counter() - start
                together = max(computing, reading) if reader.loader.num_workers else computing + reading
                return Measured(together / len(rows), memory, features)

            trial = partial(self._trial, function, digest)
            measured = reader.selector.attempt(function, trial, batch, len(rows), measure)
        self._projector.forget()
        return measured

    def _trial(self, function: ModelFunction, digest: str, first: Any = None) -> Trial:
        """Return a few examples to try an engine on: those of the batch ``first`` if they were just differentiated."""
        size = min(FEW, self.reader.size)
        known = function.tried is not None and function.tried[0] is first and len(function.tried[1][0]) == size
        batch = first if known else self.reader.read_once(range(size))
        one = self.reader.read_once([0])
        rehearsal = self.featurizer(function, LoopEngine(), digest).rehearsal
        return Trial(function, batch, size, one, rehearsal)

    def _projection(self) -> LossProjection | None:
        """Return what finds Q by projection, if it must be found so."""
        if self.reader.examples != "train" or not self.loss_terms.need_projection:
            return None
        return LossProjection(self.reader.selector.gradients, self._few)

    def _few(self) -> tuple[Any, int, Any]:
        """Return a few examples, their number, and the first of them alone."""
        size = min(FEW, self.reader.size)
        return self.reader.read_once(range(size)), size, self.reader.read_once([0])

    def _featurize(
        self, featurizer: Featurizer, rows: Sequence[int], batch: Any, projection: LossProjection | None
    ) -> tuple[Tensor, dict[str, Array]]:
        """Return φ of a batch of b examples, (b, k), and Q, w and f, (b,) each; Q and w are zero for targets."""
        result, examples = featurizer(batch, len(rows)), self.reader.examples
        check_size(self.reader.module, result.outputs, len(rows))
        check_finite("model_output", result.outputs, examples, rows)
        check_finite("the gradient of model_output", result.features.sum(1), examples, rows)
        loss_grad, curvature = torch.zeros(2, len(rows))
        if projection is not None:
            loss_grad, losses = projection(featurizer, batch, result)
            own = self.loss_terms.own_curvature(featurizer.function.call, batch, result.outputs)
            curvature = projection.curvature(loss_grad, losses) if own is None else own
        elif examples == "train":
            loss_grad, curvature = self.loss_terms(featurizer.function.call, batch, result.outputs)
        check_terms(loss_grad, curvature, examples, rows)
        numbers = {"loss_grad": loss_grad, "curvature": curvature, "outputs": result.outputs.detach()}
        # They are copied: the module may use the same memory for the next batch, while these are written.
        return result.features, {name: values.float().cpu().numpy().copy() for name, values in numbers.items()}
