"""Per-sample gradients one example at a time: slow, and right for every model that autograd can differentiate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients.engine import Sink
from lightning_trak.gradients.function import ModelFunction


class LoopEngine:
    """One backward pass for each example, which is read as a batch of its own."""

    name = "loop"
    batch_size: int | None = 1

    def __call__(self, function: ModelFunction, batch: Any, size: int, sink: Sink) -> Tensor:
        """Send the gradients of the one example; see `Engine`."""
        if size != 1:
            raise ValueError(f"gradients='loop' takes batches of one example, got {size}.")
        output, gradients = batch_gradient(function, batch)
        for name, gradient in zip(function.parameters, gradients, strict=True):
            value = torch.zeros_like(function.parameters[name]) if gradient is None else gradient
            sink(slice(0, 1), name, value.unsqueeze(0))
        return output


def batch_gradient(function: ModelFunction, batch: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Differentiate the sum of a batch's outputs once.

    Returns:
        The outputs (b,), detached, and for each parameter Σᵢ ∇θ f(zᵢ), None where f does not depend on it.

    Raises:
        ValueError: if the output depends on no attributed parameter.
    """
    parameters = {name: value.clone().requires_grad_() for name, value in function.parameters.items()}

    def differentiate(batch: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        # within the call, where the checkpoint's weights are in place: activation checkpointing runs forward again
        output = function.model_output(batch)
        if not output.requires_grad:
            return output, ()
        return output, torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)

    output, gradients = function.call(differentiate, batch, parameters=parameters)
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"{type(function.module).__name__}.model_output does not depend on any of the {len(parameters)} attributed"
            " parameters. Return the output without .detach(), .item(), torch.no_grad() or NumPy on its way, and let"
            " parameters=... select some that it uses."
        )
    return output.detach(), list(gradients)
