"""Which engine, and how many examples at a time: found out on model and machine, and mended on the way."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_trak.featurize import Featurizer
from lightning_trak.gradients import Engine, EngineChoice, EngineUnsuitable, ModelFunction, NotPrepared
from lightning_trak.memory import fitting_batch_size
from lightning_trak.projection import Projector

_PREPARED = 4  # examples on which an engine is prepared


class Adaptation:
    """Chooses the engine at every checkpoint, and the batch size once; goes on with others when they fail.

    Args:
        gradients: ``"auto"`` or the name of an engine.
        projector: what will be done with the gradients.
        batch_size: at most.
        fixed: whether the user gave the batch size; then it is not measured.
        n_examples: how many there are.
        read: returns the batch of some rows.
        tell: takes what the user should know, and for what is said once, what it is about.
        examples: what they are: ``"train"`` or ``"target"``.

    Attributes:
        batch_size: how many examples at a time, as things stand.
    """

    def __init__(
        self,
        gradients: str,
        projector: Projector,
        batch_size: int,
        *,
        fixed: bool,
        n_examples: int,
        read: Callable[[Sequence[int]], Any],
        tell: Callable[..., object],
        examples: str,
    ) -> None:
        self.batch_size = max(1, min(batch_size, n_examples))
        self._choice = EngineChoice(gradients)
        self._projector = projector
        self._fixed = self._measured = fixed
        self._n_examples = n_examples
        self._read = read
        self._tell = tell
        self._examples = examples
        self._reported: str | None = None
        self._prepared: tuple[str | None, Engine | None] = (None, None)

    def prepare(self, function: ModelFunction, digest: str | None) -> None:
        """Choose the engine for a function that was observed, and keep it for the checkpoint of this digest."""
        self._prepared = digest, self._choose(function, self._read(self._first))

    def engine(self, function: ModelFunction, digest: str, key: int, device: torch.device) -> Engine:
        """Return the engine for a checkpoint, prepared at its weights; find the batch size that the memory allows."""
        (prepared, found), self._prepared = self._prepared, (None, None)
        batch = self._read(self._first)
        function.observe(batch)
        engine = found if found is not None and prepared == digest else self._choose(function, batch)
        try:
            self._measure(function, engine, key, device)
            return engine
        except NotPrepared:  # of examples that no gradient reached before; the batches will show
            return engine
        except EngineUnsuitable as error:
            self._choice.reject(engine, error)
            return self.engine(function, digest, key, device)

    def mend(
        self, engine: Engine, error: EngineUnsuitable, function: ModelFunction, batch: Any, size: int
    ) -> Engine | None:
        """Prepare an engine on the batch that it was not prepared for; reject it if that is not what it lacks."""
        try:
            if isinstance(error, NotPrepared):
                engine.prepare(function, batch, size)
                return engine
        except EngineUnsuitable as another:
            error = another
        self._choice.reject(engine, error)
        self._measured = self._fixed
        return None

    def can_halve(self, engine: Engine | None) -> bool:
        """Whether less can be done at a time."""
        return self.batch_size > 1 and not (engine is not None and engine.batch_size == 1)

    def halve(self) -> None:
        """Go on with half the batch size after the device ran out of memory; what is done is kept."""
        self.batch_size //= 2
        gc.collect()
        torch.cuda.empty_cache()
        self._tell(f"out of memory; going on with batches of {self.batch_size} examples.")

    @property
    def _first(self) -> range:
        """The examples to try things on."""
        return range(min(_PREPARED, max(2, self.batch_size), self._n_examples))

    def _choose(self, function: ModelFunction, batch: Any) -> Engine:
        """Choose the engine at these weights; say which, if it is another than at the checkpoint before."""
        engine = self._choice.choose(function, batch, len(self._first))
        if engine.name != self._reported:
            what = f"{self._choice.report(engine)} ({self._examples} examples)."
            self._tell(what, about=what)
            self._reported = engine.name
        return engine

    def _measure(self, function: ModelFunction, engine: Engine, key: int, device: torch.device) -> None:
        if self._measured or engine.batch_size is not None:
            return
        featurizer = Featurizer(function, engine, self._projector.rehearsal(), key)
        fitting = fitting_batch_size(lambda size: featurizer(self._read(range(size)), size), self.batch_size, device)
        if fitting < self.batch_size:
            what = f"batches of {fitting} examples, as many as the free memory allows."
            self._tell(what, about=what)
            self.batch_size = fitting
        self._measured = True
