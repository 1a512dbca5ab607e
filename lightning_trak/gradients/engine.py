"""What every way of computing per-sample gradients has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lightning_trak.gradients.function import ModelFunction

Sink = Callable[[slice, str, Tensor], None]
"""Takes (rows of the batch, name of a parameter, per-sample gradients of shape (rows, *parameter.shape))."""


class Engine(Protocol):
    """Computes per-sample gradients and hands them over as they appear: a layer, or a chunk of the batch, at a time.

    The receiver projects and forgets them, so an engine that works layer by layer during one backward pass never
    needs (b, p) memory.
    """

    @property
    def name(self) -> str:
        """What ``gradients=`` calls it."""
        ...

    @property
    def batch_size(self) -> int | None:
        """The batch size that it requires; None if any will do."""
        ...

    def __call__(self, function: ModelFunction, batch: Any, size: int, sink: Sink) -> Tensor:
        """Send every parameter's gradients for every example of ``batch`` to ``sink`` exactly once.

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
    """An engine met a model or a batch that it cannot differentiate example by example."""
