"""The featurization loop: a pass over examples like that of ``trainer.predict``, which leaves no trace.

It does not call ``trainer.predict``, which would overwrite the state of a running ``fit``. Weights come in as arguments
(`ModelFunction`), so neither the module's weights nor any ``.grad`` changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.curvature import Preconditioner
from lightning_trak.data.batch import same_tensors
from lightning_trak.data.identity import digests_of_rows
from lightning_trak.data.loaders import loader_batch_size
from lightning_trak.features.featurizer import Featurizer
from lightning_trak.features.loss_projection import PER_SAMPLE_LOSS, LossProjection
from lightning_trak.features.stored import StoredForm
from lightning_trak.gradients import (
    Engine,
    EngineUnsuitable,
    LoopEngine,
    ModelFunction,
    Selector,
    Trial,
    numbered_gradient,
)
from lightning_trak.gradients.memory import peak_bytes
from lightning_trak.isolation.random_states import seed_all
from lightning_trak.projection import Projector, projection_key
from lightning_trak.store.chunks import wait_a_moment
from lightning_trak.store.weights import Weights, copy_of_weights
from lightning_trak.tasks.base import TRAKMixin, numbered, own_method, prepared
from lightning_trak.tasks.batch import read_batches
from lightning_trak.tasks.checks import (
    check_dependent,
    check_finite,
    check_independent,
    check_size,
    check_unchanged,
    described_rows,
    versions_of,
)
from lightning_trak.tasks.loss_terms import LossTerms
from lightning_trak.trainer.attachment import undisturbed
from lightning_trak.trainer.framework import LightningModule, Trainer, stop_if_asked
from lightning_trak.trainer.progress import progress
from lightning_trak.trainer.reports import Reports

Array = npt.NDArray[Any]
_TRIED = 8  # examples tried before training
_FEW = 3  # examples tried later: few models have an axis of this size
_FEWER = 2  # targets tried: gradients were checked on the train set
_SHOWN = 10  # examples named in a warning, at most
_WHITENED, _WHITENED_ON_GPU = 2**25, 2**29  # entries of whitened gradients at once; more take no less time on a CPU
_WITHOUT_AUGMENTATION = {
    "train": "Define featurize_dataloader() in the LightningDataModule or LightningModule: train_dataloader without"
    " augmentation.",
    "target": "Pass targets without augmentation with dataloaders=..., or define attribute_dataloader() in the"
    " LightningDataModule or LightningModule.",
}


class FeatureBlock(NamedTuple):
    """What is computed of a batch of r examples.

    Attributes:
        features: φ, (r, k), on the device.
        outputs: f, (r,).
        loss_grad: Q, (r,); zero for targets.
        curvature: w, (r,); zero for targets.
    """

    features: Tensor
    outputs: Array
    loss_grad: Array
    curvature: Array


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
    """Reads the examples of a dataset and turns them into features, checkpoint by checkpoint.

    Args:
        trainer: supplies device, precision and progress bar.
        module: the user's model.
        loader: the user's loader; its dataset, collate function and workers are used, its order is not.
        find_train_loader: returns the train loader, for modules that need training examples.
        parameters: names of the attributed parameters.
        projector: the family of projections.
        preconditioner: how gradients are whitened; None if they are not.
        dtype: in which features are stored.
        seed: determines the projection, together with the checkpoint's digest.
        selector: chooses engine and batch size.
        examples: what the rows are, for messages: ``"train"`` or ``"target"``.
        reports: takes messages to the user.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        loader: DataLoader[Any],
        find_train_loader: Callable[[], DataLoader[Any]],
        *,
        parameters: Sequence[str],
        projector: Projector,
        preconditioner: Preconditioner | None = None,
        dtype: str = "float32",
        seed: int,
        selector: Selector,
        examples: str,
        reports: Reports,
    ) -> None:
        self._trainer, self._module, self._loader = trainer, module, loader
        self._find_train_loader, self._parameters = find_train_loader, list(parameters)
        self._projector, self._seed, self._selector = projector, seed, selector
        self.examples, self._reports = examples, reports
        self.preconditioner, self._dtype = preconditioner, dtype
        self._loss_terms = LossTerms(module)
        self._label: Callable[[Any], Any] | None = None
        self.repeatable = True  # whether two reads of an example are equal; preflight finds out
        self.seconds = 0.0  # that an example takes at most, as far as known
        self.logistic = not self._loss_terms.need_projection  # whether the loss may be softplus(−f)

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self._loader.dataset)  # type: ignore[arg-type]

    @property
    def dataset(self) -> Any:
        """The data set that has the examples."""
        return self._loader.dataset

    @property
    def sizes(self) -> dict[str, int]:
        """The number of entries of each attributed parameter, in order."""
        own = dict(self._module.named_parameters())
        return {name: own[name].numel() for name in self._parameters}

    @property
    def device(self) -> torch.device:
        """Where features are computed."""
        return self._trainer.strategy.root_device

    @property
    def dimension(self) -> int:
        """k, the number of features."""
        return self._projector.dimension(sum(self.sizes.values()))

    @property
    def form(self) -> StoredForm:
        """How features are stored."""
        own = self.preconditioner
        if own is None:
            return StoredForm(self.dimension, self._dtype)
        entries = own.entries if self.examples == "train" else own.target_entries
        return StoredForm(self.dimension, entries=min(entries, self.dimension))

    @property
    def n_trainable(self) -> int:
        """The number of trained parameters; if all are frozen, of attributed ones."""
        own = dict(self._module.named_parameters())
        trained = sum(value.numel() for value in own.values() if value.requires_grad)
        return trained or sum(self.sizes.values())

    def label_targets(self, load: Callable[[], Weights]) -> None:
        """Let the module label targets, if it can, with the weights that ``load`` returns."""
        label = own_method(self._module, "label_targets")
        if label is not None:
            self._label = partial(self._function(load()).call, label)

    def preflight(self, weights: Weights, digest: str = "", *, thorough: bool = False) -> None:
        """Try a few examples, so that errors come now and not after hours of training.

        Args:
            weights: of any checkpoint; the module may change them.
            digest: their digest, if `run` will use them.
            thorough: whether to try more examples, and to check all outputs of the first batch.

        Raises:
            ValueError: if outputs have the wrong shape, do not depend on the parameters, depend on the rest of the
                batch, or are not finite; or if the loss terms do not belong together.
        """
        with self._undisturbed(), ExitStack() as stack:
            function = self._function(weights)
            stack.enter_context(prepared(self._module, function.prepare, self._find_train_loader))
            train = self.examples == "train"
            rows = range(min(self._largest, _TRIED if thorough else _FEW if train else _FEWER))
            alone = rows if thorough else sorted({rows[0], rows[-1]}) if train else rows[-1:]
            batch = self._read_once(rows, seed=0)
            self.repeatable = self._is_repeatable(batch, self._read_once(rows, seed=1))
            versions = versions_of(batch)
            start = perf_counter()
            outputs = self._try(function, batch, alone, len(rows))
            self.seconds = (perf_counter() - start) / len(rows)
            check_unchanged(self._module, batch, versions)
            if not train:
                return
            if self.preconditioner is not None:
                self._check_drawn(function, batch, len(rows))
            if self._loss_terms.need_projection:
                losses = function.of(PER_SAMPLE_LOSS)
                self._try(losses, batch, alone, len(rows))
                if self._selector.gradients != "auto":  # with "auto", some engine can
                    Selector(self._selector.gradients).choose(losses, batch, len(rows))
            else:
                self._check_loss(*self._loss_terms(function.call, batch, outputs), rows)
            engine = self._prepare(function, digest, projection_key(self._seed, digest), batch)
            if thorough:
                self._try_whole_batch(function, engine)

    def digests(self, weights: Weights) -> list[bytes] | None:
        """Return a digest of each example, as the module gets it; None if they are random, or cannot be compared.

        Args:
            weights: of any checkpoint; the module may change them.
        """
        if not self.repeatable:
            return None
        with self._at(weights, "Reading targets", self.size) as (_, advance):
            seed_all(0)
            found: list[bytes] = []
            for rows, batch in self._read(range(self.size), self._largest):
                own = digests_of_rows(batch, len(rows))
                if own is None:
                    return None
                found += own
                advance(len(rows))
            return found

    @property
    def describes(self) -> bool:
        """Whether the module says anything of examples; a method of this name that is not of `TRAKMixin` may not."""
        return isinstance(self._module, TRAKMixin) and own_method(self._module, "describe") is not None

    def described(self, weights: Weights) -> dict[str, list[Any]]:
        """Return what the module's ``describe`` says of all examples: a value for each row, by name.

        None stands where it said nothing.

        Args:
            weights: of a checkpoint; the module may change them.

        Raises:
            TypeError, ValueError: if it returns anything but a value for each example.
        """
        columns: dict[str, list[Any]] = {}

        def describe(function: ModelFunction, rows: Sequence[int], batch: Any) -> None:
            said = function.call(self._module.describe, batch)
            for name, values in described_rows(self._module, said, len(rows)).items():
                column = columns.setdefault(name, [None] * self.size)
                column[rows[0] : rows[-1] + 1] = values

        what = "targets" if self.examples == "target" else "the train set"
        self._without_gradients(weights, describe, f"Describing {what}", labelled=False)
        return columns

    @property
    def loss_known(self) -> bool:
        """Whether the module defines a loss; it may define Q alone."""
        return self._loss_terms.loss_known

    @property
    def loss_needs_model(self) -> bool:
        """Whether the loss is no function of the model output; then `losses` evaluates the model."""
        return self._loss_terms.loss_needs_model

    def losses(self, weights: Weights, outputs: Tensor, description: str) -> Tensor:
        """Return the losses that belong to model outputs, (c, size), at several checkpoints.

        Args:
            weights: of a checkpoint; the module may change them. They count only if the loss needs the model.
            outputs: f of all examples, (c, size).
            description: what the progress bar says.
        """
        found = torch.zeros(outputs.shape)

        def compute(function: ModelFunction, rows: Sequence[int], batch: Any) -> None:
            own = slice(rows[0], rows[-1] + 1)
            for losses, known in zip(found, outputs, strict=True):
                losses[own] = self._loss_terms.losses(function.call, batch, known[own].to(self.device)).float().cpu()
            check_finite("the loss", found[:, own].sum(0), self.examples, rows)

        self._without_gradients(weights, compute, description)
        return found

    def loss_grads(self, weights: Weights, outputs: Tensor, description: str) -> Tensor:
        """Return Q of model outputs, (size,): see `losses`."""
        found = torch.zeros(outputs.shape)

        def compute(function: ModelFunction, rows: Sequence[int], batch: Any) -> None:
            own = slice(rows[0], rows[-1] + 1)
            found[own] = self._loss_terms(function.call, batch, outputs[own].to(self.device))[0].float().cpu()

        self._without_gradients(weights, compute, description)
        return found

    def _without_gradients(
        self,
        weights: Weights,
        work: Callable[[ModelFunction, Sequence[int], Any], object],
        description: str,
        *,
        labelled: bool = True,
    ) -> None:
        """Call ``work`` with (function, rows, batch) for each batch of all examples, at one checkpoint."""
        with self._at(weights, description, self.size) as (function, advance):
            seed_all(0)
            size = 1 if self._selector.gradients == "loop" else self._selector.batch_size(self._largest)
            for rows, batch in self._read(range(self.size), size, labelled=labelled):
                with torch.no_grad():
                    work(function, rows, batch)
                advance(len(rows))
                stop_if_asked(self._trainer)

    def measured(self, weights: Weights, digest: str, projector: Projector | None = None) -> Measured:
        """Featurize the first batch twice; measure the second time.

        Args:
            weights: of a checkpoint; the module may change them.
            digest: their digest.
            projector: see `run`.
        """
        with self._undisturbed(), ExitStack() as stack:
            function, key = self._function(weights), projection_key(self._seed, digest)
            stack.enter_context(prepared(self._module, function.prepare, self._find_train_loader))
            engine = self._prepare(function, digest, key)
            rows = range(engine.batch_size or self._selector.batch_size(self._largest))
            start = perf_counter()
            batch = self._read_once(rows, seed=0)
            reading = (perf_counter() - start) / max(1, self._loader.num_workers)

            def measure(engine: Engine) -> Measured:
                featurizer, projection = self.featurizer(function, engine, digest, projector), self._projection()
                memory = peak_bytes(lambda: self._featurize(featurizer, rows, batch, projection), self.device)
                start = perf_counter()
                block = self._featurize(featurizer, rows, batch, projection)
                computing = perf_counter() - start
                together = max(computing, reading) if self._loader.num_workers else computing + reading
                return Measured(together / len(rows), memory, block.features)

            measured = self._selector.attempt(function, partial(self._trial, function, key), batch, len(rows), measure)
        self._projector.forget()
        return measured

    def draws_anything(self) -> bool:
        """Say whether the module draws a label for the first example: of two classes, its output tells all."""
        with self._undisturbed(), ExitStack() as stack:
            function = self._function(copy_of_weights(self._module))
            stack.enter_context(prepared(self._module, function.prepare, self._find_train_loader))
            return self.drawn_labels(function, self._read_once([0], seed=0), [0], [0]) is not None

    def drawn_labels(self, function: ModelFunction, batch: Any, rows: Sequence[int], seeds: Sequence[int]) -> Any:
        """Draw labels from the predictions for the examples of a batch, by a seed for each."""
        with torch.no_grad():
            try:
                return function.call(self._module.draw_labels, batch, seeds)  # type: ignore[operator]
            except ValueError:
                check_finite("model_output", function.of("model_output").output(batch), self.examples, rows)
                raise

    def _check_drawn(self, function: ModelFunction, batch: Any, size: int) -> None:
        if self.drawn_labels(function, batch, range(size), [0] * size) is None:
            raise ValueError(
                f"preconditioner='kronecker', but the output of {type(self._module).__name__} tells all, as for two"
                " classes or a single number: no label is left to draw. Leave preconditioner out of TRAKCallback."
            )

    def _try_whole_batch(self, function: ModelFunction, engine: Engine) -> None:
        """Check all outputs and gradients of the first batch, as far as memory allows."""
        rows = range(engine.batch_size or self._selector.batch_size(self._largest))
        with suppress(torch.OutOfMemoryError):
            batch = self._read_once(rows, seed=0)
            check_finite("model_output", function.output(batch).detach(), self.examples, rows)
            try:
                self._selector.check(function, engine, batch, len(rows))
            except EngineUnsuitable as error:
                self._selector.reject(engine, error)

    def _try(self, function: ModelFunction, batch: Any, alone: Sequence[int], size: int) -> Tensor:
        """Evaluate a method on a batch, check that it can be attributed, and return its outputs.

        Args:
            function: the model at some weights.
            batch: the first examples.
            alone: which of them must have the same output in a batch of their own.
            size: their number.
        """
        method = function.method
        if self.examples == "train":
            with function.observing():
                _, outputs, gradients = numbered_gradient(function, batch, size)
            dependent = bool(gradients)
        else:
            outputs = function.observe(batch)
            check_size(self._module, outputs, size, method)
            dependent, outputs = outputs.requires_grad, outputs.detach()
        check_dependent(self._module, dependent, len(self._parameters), method)
        check_finite(method, outputs, self.examples, range(size))
        if self._selector.gradients != "loop" and self.repeatable:
            for row in alone:
                by_itself = function.observe(self._read_once([row], seed=0)).detach()
                what, together = f"{type(self._module).__name__}.{method}", outputs[row : row + 1]
                check_independent(what, together, by_itself, function.tolerance, self.examples, row)
        return outputs

    def run(
        self,
        weights: Weights,
        digest: str,
        rows: Iterable[int],
        receive: Callable[[Sequence[int], FeatureBlock], object],
        description: str,
        projector: Projector | None = None,
        total: int | None = None,
    ) -> LossProjection | None:
        """Featurize ``rows`` at one checkpoint.

        Args:
            weights: the checkpoint's weights.
            digest: their digest.
            rows: which examples, in this order; asked for when they are read.
            receive: takes rows and their `FeatureBlock`, batch by batch.
            description: what the progress bar says.
            projector: used instead of the loop's own, e.g. a `Whitening`.
            total: the number of rows, if they have no length.

        Returns:
            The projection that gave Q; None if Q needed none.
        """
        projection = self._projection()

        def featurize(function: ModelFunction, engine: Engine, batch_rows: Sequence[int], batch: Any) -> None:
            featurizer = self.featurizer(function, engine, digest, projector)
            receive(batch_rows, self._featurize(featurizer, batch_rows, batch, projection))

        self.each_batch(weights, digest, rows, featurize, description, total)
        self._projector.forget()
        return projection

    def featurizer(
        self, function: ModelFunction, engine: Engine, digest: str, projector: Projector | None = None
    ) -> Featurizer:
        """Return what turns batches into features at a checkpoint; see `run`."""
        return Featurizer(function, engine, projector or self._projector, projection_key(self._seed, digest))

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
        count = len(rows) if isinstance(rows, Sized) else total or 0
        with self._at(weights, description, count) as (function, advance):
            key = projection_key(self._seed, digest)

            def advancing(engine: Engine, batch_rows: Sequence[int], batch: Any) -> None:
                work(function, engine, batch_rows, batch)
                advance(len(batch_rows))
                stop_if_asked(self._trainer)

            prepare = partial(self._prepare, function, digest, key)
            self._selector.run(rows, self._largest, self._read, prepare, advancing, function)

    def warn_of_zero_gradients(self, rows: Sequence[int]) -> None:
        """Warn of targets with a zero gradient; with only some parameters attributed, a dead unit may be the cause."""
        if not rows:
            return
        shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
        what = (
            f"The gradient of {type(self._module).__name__}.model_output is zero for {len(rows)} targets (rows"
            f" {shown}), so all of their scores are zero too. If an output_mask or ignore_index leaves out all of"
            " their parts, fix or remove these targets."
        )
        trained = {name for name, value in self._module.named_parameters() if value.requires_grad}
        tell = self._reports.warn if trained <= set(self._parameters) else self._reports.tell
        tell(what, about=what)

    @property
    def _largest(self) -> int:
        """The largest batch size; of whitened gradients, which are dense, as many as take 128 MiB, on a GPU 2 GiB."""
        size = min(self._selector.given or loader_batch_size(self._loader), self.size)
        if self.preconditioner is None:
            return size
        entries = _WHITENED_ON_GPU if self.device.type == "cuda" else _WHITENED
        return min(size, max(1, entries // self.dimension))

    def _prepare(self, function: ModelFunction, digest: str, key: int, tried: Any = None) -> Engine:
        """Return the engine for a checkpoint; ``tried`` are the first examples, if already read."""
        trial = partial(self._trial, function, key, tried)
        return self._selector.prepare(function, digest, trial, self._largest)

    def _trial(self, function: ModelFunction, key: int, tried: Any = None) -> Trial:
        """Return a few examples to try an engine on."""
        size = min(_FEW, self.size)
        known = function.tried is not None and function.tried[0] is tried and len(function.tried[1][0]) == size
        batch = tried if known else self._read_once(range(size), seed=0)
        first = self._read_once([0], seed=0)
        rehearsal = Featurizer(function, LoopEngine(), self._projector, key).rehearsal
        return Trial(function, batch, size, first, rehearsal)

    @contextmanager
    def _at(
        self, weights: Weights, description: str, total: int
    ) -> Iterator[tuple[ModelFunction, Callable[[int], object]]]:
        """Yield the module at a checkpoint's weights, prepared, and what advances a progress bar."""
        with self._undisturbed(), progress(self._trainer, description, total) as advance:
            function = self._function(weights)
            with prepared(self._module, function.prepare, self._find_train_loader):
                yield function, advance

    def _undisturbed(self) -> AbstractContextManager[None]:
        return undisturbed(self._trainer, self._module, self._loader.dataset, self._loader.collate_fn)

    def _projection(self) -> LossProjection | None:
        if self.examples != "train" or not self._loss_terms.need_projection:
            return None
        size = min(_FEW, self.size)

        def read() -> tuple[Any, int, Any]:
            return self._read_once(range(size), seed=0), size, self._read_once([0], seed=0)

        return LossProjection(self._selector.gradients, read)

    def report(self, projection: LossProjection) -> None:
        """Report how Q was found by projection, at the first checkpoint; warn once of each kind of doubt."""
        self._reports.tell(f"{projection}.", about="projection")
        for kind, doubt in projection.doubts().items():
            self._reports.warn(doubt, about=kind)

    def _featurize(
        self, featurizer: Featurizer, rows: Sequence[int], batch: Any, projection: LossProjection | None
    ) -> FeatureBlock:
        result = featurizer(batch, len(rows))
        check_size(self._module, result.outputs, len(rows))
        check_finite("model_output", result.outputs, self.examples, rows)
        check_finite("the gradient of model_output", result.features.sum(1), self.examples, rows)
        loss_grad, curvature = torch.zeros(2, len(rows))
        if projection is not None:
            loss_grad, losses = projection(featurizer, batch, result)
            own = self._loss_terms.own_curvature(featurizer.function.call, batch, result.outputs)
            curvature = projection.curvature(loss_grad, losses) if own is None else own
        elif self.examples == "train":
            loss_grad, curvature = self._loss_terms(featurizer.function.call, batch, result.outputs)
        self._check_loss(loss_grad, curvature, rows)
        numbers = (values.float().cpu() for values in (result.outputs.detach(), loss_grad, curvature))
        return FeatureBlock(result.features, *(values.numpy() for values in numbers))

    def _check_loss(self, loss_grad: Tensor, curvature: Tensor, rows: Sequence[int]) -> None:
        """Check Q and w."""
        check_finite("out_to_loss_grad", loss_grad, self.examples, rows)
        check_finite("out_to_loss_curvature", curvature, self.examples, rows)

    def wait(self) -> None:
        """Wait a moment for other processes, unless this one was told to stop."""
        self._reports.tell_once("other processes compute what is missing; waiting for them.")
        stop_if_asked(self._trainer)
        wait_a_moment()

    def _function(self, weights: Weights) -> ModelFunction:
        device, plugin = self._trainer.strategy.root_device, self._trainer.precision_plugin
        for name, value in self._module.named_parameters():
            stored = weights.get(name, value).dtype
            if stored not in (value.dtype, plugin.convert_input(value.detach().reshape(-1)[:0]).dtype):
                raise ValueError(
                    f"The checkpoint's {name} is {stored}, the model's {value.dtype} under"
                    f" Trainer(precision={plugin.precision!r}). Use the precision of the training."
                )
        return ModelFunction(self._module, weights, self._parameters, device, plugin.convert_input)

    def _read(
        self, rows: Iterable[int], batch_size: int, num_workers: int | None = None, *, labelled: bool = True
    ) -> Iterator[tuple[Any, Any]]:
        dataset = None if self.examples == "train" else self._loader.dataset
        for own, batch in read_batches(self._trainer, self._module, self._loader, rows, batch_size, num_workers):
            complete = self._label(batch) if labelled and self._label is not None else batch
            yield own, numbered(self._module, complete, own, dataset)

    def _read_once(self, rows: Sequence[int], seed: int) -> Any:
        seed_all(seed)
        return next(self._read(rows, len(rows), num_workers=0))[1]

    def _is_repeatable(self, first: Any, second: Any) -> bool:
        same = same_tensors(first, second)
        if not same:
            self._reports.warn(
                f"Two reads of the same {self.examples} examples differ: the dataset, its collate function or a"
                " batch-transfer hook augments at random. Features are those of one random draw."
                f" {_WITHOUT_AUGMENTATION[self.examples]}",
                about=f"reads of {self.examples} examples",
            )
        return same
