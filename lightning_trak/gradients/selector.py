"""Choose which engine differentiates a model, and how many examples at a time; fall back to others on failure."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from textwrap import shorten
from typing import Any, NamedTuple, TypeVar

import torch

from lightning_trak.gradients.calls import WrongRule
from lightning_trak.gradients.check import GradientsDiffer, check_gradients
from lightning_trak.gradients.engine import Engine, EngineUnsuitable, NotPrepared, Sink
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.hooks import HooksEngine
from lightning_trak.gradients.loop import LoopEngine, numbered_gradient
from lightning_trak.gradients.memory import fitting_batch_size, is_out_of_memory, peak_bytes, surely_fits
from lightning_trak.gradients.vmap import VmapEngine

_LONGEST = 160  # characters of a reason

ENGINES: dict[str, Callable[[], Engine]] = {"hooks": HooksEngine, "vmap": VmapEngine, "loop": LoopEngine}
"""By name, best first: ``gradients="auto"`` takes the first that suits the model."""

T = TypeVar("T")


class Trial(NamedTuple):
    """A few examples to try an engine on.

    Attributes:
        function: the model at the weights of a checkpoint.
        batch: the examples.
        size: their number.
        first: the first of them alone.
        sink: takes a number of examples; returns a sink that needs as much memory for them as the real one.
    """

    function: ModelFunction
    batch: Any
    size: int
    first: Any = None
    sink: Callable[[int], Sink] = lambda _: lambda *_: None


class Selector:
    """Chooses engine and batch size, and falls back to others when they fail.

    ::

        state                event                   next state
        no engine            choose                  prepared
        prepared             gradients are right     in use at this checkpoint
        prepared             gradients are wrong     an error
        in use               another checkpoint      kept: checked there on a few examples
        kept                 gradients are right     in use at that checkpoint too
        kept                 gradients are wrong     no engine; it may be chosen again
        any with an engine   NotPrepared             prepared anew, on the examples that failed
        any with an engine   EngineUnsuitable        no engine; it is never chosen again
        in use               out of memory           in use, with half the batch size

    Args:
        gradients: ``"auto"`` or the name of the one engine that may be taken.
        batch_size: how many examples at a time; None for as many as the caller has and the memory allows.
        tell: called with messages for the user.

    Attributes:
        gradients: as given.
        given: the batch size, as given.

    Raises:
        ValueError: if no engine is left; as `GradientsDiffer`, if gradients are wrong. All methods may raise it.
    """

    def __init__(
        self, gradients: str, batch_size: int | None = None, tell: Callable[[str], object] = lambda _: None
    ) -> None:
        self.gradients, self.given, self._tell = gradients, batch_size, tell
        self._left = list(ENGINES) if gradients == "auto" else [gradients]
        self._rejected: list[str] = []
        self._unprepared: list[str] = []
        self._engine: Engine | None = None
        self._checked: set[str] = set()
        self._tolerance: float | None = None
        self._fits: int | None = None  # the batch size that the memory allows, once that is known
        self._told = ""

    def choose(self, function: ModelFunction, batch: Any, size: int) -> Engine:
        """Return the best engine that suits the model, prepared on the examples of ``batch``."""
        if self._engine is not None:
            return self._engine
        self._unprepared = []
        for name in self._left:
            engine, last = ENGINES[name](), name == self._left[-1]
            try:
                engine.prepare(function, batch, size)
                self._engine, self._checked = engine, set()
                return engine
            except (WrongRule, torch.OutOfMemoryError):
                raise
            except Exception as error:  # The model runs, so this engine does not support it.
                why = str(error) if isinstance(error, EngineUnsuitable) else f"{type(error).__name__}: {error}"
                if last:
                    raise self._none_left(why) from error
                self._unprepared.append(f"not {name}, as {_short(why)}")
        raise AssertionError("the last engine raises if it fails")

    def reject(self, engine: Engine, error: EngineUnsuitable) -> None:
        """Never choose an engine again, because of an ``error`` that came up in use."""
        self._engine = None
        self._left.remove(engine.name)
        self._rejected.append(f"not {engine.name}, as {_short(str(error))}")
        if not self._left:
            raise self._none_left(str(error)) from error

    def prepare(
        self, function: ModelFunction, checkpoint: str, trial: Callable[[], Trial], largest: int | None = None
    ) -> Engine:
        """Return the engine, prepared, and checked at this checkpoint; find the batch size that the memory allows.

        Args:
            function: the model at the weights of the checkpoint.
            checkpoint: identifies the weights.
            trial: returns a few examples.
            largest: how many examples at a time, at most; None if the batch size is not the selector's to choose.
        """
        if self._tolerance is not None:
            function.tolerance = self._tolerance
        if self._engine is not None and checkpoint in self._checked:
            return self._engine
        tried = trial()
        if self._tolerance is None:
            with function.observing():
                numbered_gradient(function, tried.batch, tried.size)
            self._tolerance = function.tolerance
        while True:
            fresh = self._engine is None
            engine = self.choose(function, tried.batch, tried.size)
            try:
                self._check(engine, tried, largest)
            except EngineUnsuitable as error:
                self.reject(engine, error)
            except GradientsDiffer:
                if fresh:
                    raise
                self._engine = None  # prepared at other weights; prepare it anew at these
            else:
                self._checked.add(checkpoint)
                self._report(engine)
                function.tried = None
                return engine

    def run(
        self,
        rows: Iterable[int],
        largest: int,
        read: Callable[[Iterable[int], int], Iterable[tuple[Sequence[int], Any]]],
        prepare: Callable[[], Engine],
        work: Callable[[Engine, Sequence[int], Any], object],
        function: ModelFunction,
    ) -> None:
        """Work on all rows, batch by batch. After a failure, go on with the rows that are not yet done.

        Args:
            rows: which examples; asked for when they are read.
            largest: how many of them at a time, at most.
            read: takes rows and a batch size; returns (rows, batch) for each batch, in the order of the rows.
            prepare: calls `prepare`.
            work: takes engine, rows and batch.
            function: the model at the weights of the checkpoint.
        """
        source, undone = iter(rows), deque[int]()  # rows that were asked for, and not worked on

        def left() -> Iterator[int]:
            yield from list(undone)
            for row in source:
                undone.append(row)
                yield row

        batch, size, finished = None, 0, False
        while not finished:
            engine, full = None, False
            try:
                engine = prepare()
                for batch_rows, batch in read(left(), engine.batch_size or self.batch_size(largest)):
                    size = len(batch_rows)
                    work(engine, batch_rows, batch)
                    for _ in batch_rows:
                        undone.popleft()
                finished = True
            except EngineUnsuitable as error:
                if engine is None:
                    raise
                self._mend(engine, error, Trial(function, batch, size))
            except RuntimeError as error:
                alone = self.batch_size(largest) == 1 or (engine is not None and engine.batch_size == 1)
                if not is_out_of_memory(error) or alone:
                    raise
                full = True
            if full:  # not in the handler, where the exception still holds the batch's tensors
                self._shrink(self.batch_size(largest) // 2)

    def attempt(
        self, function: ModelFunction, trial: Callable[[], Trial], batch: Any, size: int, compute: Callable[[Engine], T]
    ) -> T:
        """Compute something from one whole batch, with the first engine that can."""
        while True:
            engine = self.prepare(function, "", trial)
            try:
                return compute(engine)
            except EngineUnsuitable as error:
                self._mend(engine, error, Trial(function, batch, size))

    def batch_size(self, largest: int) -> int:
        """Return the current batch size."""
        return max(1, min(size for size in (largest, self.given, self._fits) if size is not None))

    @property
    def engine(self) -> str:
        """The engine in use, with what it leaves to another; empty without one."""
        return "" if self._engine is None else str(self._engine)

    def __str__(self) -> str:
        return "; ".join([f"gradients by {self._engine}", *self._rejected, *self._unprepared])

    def _check(self, engine: Engine, trial: Trial, largest: int | None) -> None:
        """Check the gradients; the first time, also measure how much memory they take."""
        function, device = trial.function, next(iter(trial.function.parameters.values())).device

        def run(size: int) -> None:
            self.check(function, engine, trial.batch if size == trial.size else trial.first, size, trial.sink(size))

        # One example at a time may be all that an engine can take: the graphs of a batch do not come apart.
        at_a_time = engine.batch_size or (trial.size if largest is None else self.batch_size(largest))
        size = trial.size if at_a_time >= trial.size else 1
        known = self.given is not None or self._fits is not None or engine.batch_size is not None
        try:
            if largest is None or known or largest <= size:
                run(size)
                return
            per_example = peak_bytes(lambda: run(size), device) / size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            self._shrink(size - 1)
            run(1)
            return
        if not surely_fits(largest * per_example, device):
            self._fits = fitting_batch_size(run, largest, device, trial.size)
        if self.batch_size(largest) < largest:
            self._tell(f"batches of {self._fits} examples, as many as the free memory allows.")

    def check(
        self, function: ModelFunction, engine: Engine, batch: Any, size: int, sink: Sink = lambda *_: None
    ) -> None:
        """Check the gradients of a batch, and prepare the engine on it if it was not prepared for it.

        Raises:
            EngineUnsuitable: if it cannot be prepared for it.
        """
        try:
            check_gradients(function, engine, batch, size, sink)
        except NotPrepared:
            _prepare_anew(engine, function, batch, size, sink)

    def _mend(self, engine: Engine, error: EngineUnsuitable, trial: Trial) -> None:
        """Prepare an engine on the examples that it was not prepared for; reject it if that is not what it lacks."""
        try:
            if isinstance(error, NotPrepared):
                _prepare_anew(engine, trial.function, trial.batch, trial.size)
                return
        except EngineUnsuitable as another:
            error = another
        self.reject(engine, error)

    def _shrink(self, size: int) -> None:
        """Go on with fewer examples at a time after the device ran out of memory."""
        self._fits = size
        gc.collect()
        torch.cuda.empty_cache()
        self._tell(f"out of memory; going on with batches of {self._fits} examples.")

    def _report(self, engine: Engine) -> None:
        """Say which engine was chosen, if it changed."""
        if engine.name != self._told:
            self._tell(f"{self}.")
            self._told = engine.name

    def _none_left(self, why: str) -> ValueError:
        others = "" if self.gradients in ("auto", "loop") else " Use gradients='auto' or 'loop'."
        return ValueError(f"gradients={self.gradients!r} cannot differentiate this model: {why.rstrip('.')}.{others}")


def _prepare_anew(engine: Engine, function: ModelFunction, batch: Any, size: int, sink: Sink = lambda *_: None) -> None:
    """Prepare an engine on examples that it was not prepared for, and check it on them."""
    engine.prepare(function, batch, size)
    check_gradients(function, engine, batch, size, sink)


def _short(why: str) -> str:
    """Cut a reason, so that a report stays one line."""
    return shorten(why, _LONGEST, placeholder=" ...")
