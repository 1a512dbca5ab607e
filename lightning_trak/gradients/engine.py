"""The interface of engines, which compute per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.gradient import Gradient

T = TypeVar("T")
Sink = Callable[[slice, str, Gradient], None]
"""Takes (rows of the batch, name of a parameter, the gradients of these rows).

A parameter's gradients may come in parts, one for each use of it: what counts is their sum.
"""


class Engine(Protocol):
    """Computes per-sample gradients and hands them over as they appear: a layer, or a chunk of the batch, at a time.

    The receiver projects and discards them. So an engine that works layer by layer, during one backward pass, never
    holds (b, p) numbers.
    """

    @property
    def name(self) -> str:
        """What ``gradients=`` calls it."""
        ...

    @property
    def batch_size(self) -> int | None:
        """The batch size that it requires; None if any will do."""
        ...

    def prepare(self, function: ModelFunction, batch: Any, size: int) -> None:
        """Find out on a few examples whether, and how, this engine differentiates this model; see `__call__`."""
        ...

    def __call__(self, function: ModelFunction, batch: Any, size: int, sink: Sink) -> Tensor:
        """Send every parameter's gradients for every example of ``batch`` to ``sink``.

        Args:
            function: the model at the weights of a checkpoint.
            batch: any structure of tensors that ``model_output`` takes.
            size: b, the number of examples in it.
            sink: receives ∇θ f(z), detached.

        Returns:
            The model outputs f(z), (b,), detached.

        Raises:
            EngineUnsuitable: if this engine cannot differentiate this model or this batch; another may.
        """
        ...


class EngineUnsuitable(RuntimeError):
    """An engine cannot compute per-sample gradients of a model or a batch."""


class NotPrepared(EngineUnsuitable):
    """A batch differs from the examples that the engine was prepared on: prepare it on this batch too."""


def check_same(alone: Tensor, together: Tensor, tolerance: float) -> None:
    """Raise if an example's output depends on the rest of the batch, e.g. through a tensor shared by all."""
    if alone.shape != together.shape or not torch.allclose(alone, together, tolerance, tolerance, equal_nan=True):
        raise EngineUnsuitable("model_output of an example alone differs from its output within the batch")


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Tell whether two tensors are equal up to rounding, relative to the largest entry."""
    finite, one = other[other.isfinite()], one.to(other.dtype)  # featurization reports what is not finite
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, 0, tolerance * scale + 1e-12, equal_nan=True)


def run_prepared(engine: Engine, function: ModelFunction, batch: Any, size: int, run: Callable[[], T]) -> T:
    """Return what ``run`` returns, which calls the engine; prepare the engine first if it was not for this method.

    Another method of a module may reach layers that its output does not.
    """
    try:
        return run()
    except NotPrepared:
        engine.prepare(function, batch, size)
        return run()
