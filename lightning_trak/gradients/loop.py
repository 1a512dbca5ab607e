"""Per-sample gradients, one example at a time: slow, but right for every model that autograd can differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_trak.data.batch import check_rows, map_tensors
from lightning_trak.gradients.engine import EngineUnsuitable, Sink, check_same
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.gradient import DenseGradient
from lightning_trak.tasks.checks import check_size


class LoopEngine:
    """One backward pass for each example, which is read as a batch of one."""

    name = "loop"
    batch_size: int | None = 1

    def prepare(self, function: ModelFunction, batch: Any, size: int) -> None:
        """Do nothing: every model is supported."""

    def __call__(self, function: ModelFunction, batch: Any, size: int, sink: Sink) -> Tensor:
        """Send per-sample gradients, one at a time; a larger batch is cut into its rows. See `Engine`."""
        outputs = []
        for row in range(size):
            output, gradients = batch_gradient(function, batch if size == 1 else _row(batch, row, size))
            outputs.append(output)
            for name, gradient in zip(function.parameters, gradients, strict=True):
                value = torch.zeros_like(function.parameters[name]) if gradient is None else gradient
                sink(slice(row, row + 1), name, DenseGradient(value.unsqueeze(0)))
        if size == 1:
            return outputs[0]
        together = function.output(batch).detach()
        check_same(torch.cat(outputs) if outputs else together, together, function.tolerance)
        return together

    def __str__(self) -> str:
        return self.name


def _row(batch: Any, row: int, size: int) -> Any:
    problem = check_rows(batch, size)
    if problem:
        raise EngineUnsuitable(problem)
    return map_tensors(batch, lambda tensor: tensor[row : row + 1])


def batch_gradient(
    function: ModelFunction,
    batch: Any,
    weights: Tensor | None = None,
    watch: Callable[[Iterable[Tensor]], AbstractContextManager[Any]] = lambda leaves: nullcontext(),
) -> tuple[Tensor, list[Tensor | None]]:
    """Differentiate the weighted sum of a batch's outputs once.

    Args:
        function: the model at some weights.
        batch: what ``model_output`` takes.
        weights: v, (b,); None for ones.
        watch: takes the parameters with respect to which f is differentiated; returns a context for the forward pass.

    Returns:
        The outputs (b,), detached, and for each parameter Σᵢ vᵢ ∇θ f(zᵢ), None where f does not depend on it.
    """
    parameters = {name: value.detach().requires_grad_() for name, value in function.parameters.items()}

    def differentiate(batch: Any) -> Tensor:
        # Backward runs within the call, where the checkpoint's weights are in place: activation checkpointing runs
        # forward again. It supports ``backward``, not ``autograd.grad``. The leaves are ours, not the module's.
        with watch(parameters.values()):
            output = function.model_output(batch)
        if weights is not None:
            check_size(function.module, output, len(weights), function.method)
        if output.requires_grad:
            (output if weights is None else output * weights.to(output)).sum().backward()
        return output.detach()

    outputs = function.call(differentiate, batch, parameters=parameters)
    grads = [value.grad for value in parameters.values()]
    return outputs, [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]


def numbered_gradient(function: ModelFunction, batch: Any, size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Differentiate Σᵢ i f(zᵢ), the sum of a batch's outputs with weights 1 to b; the last result is cached.

    No two examples have the same weight, so the gradient tells them apart. It is cached because preparing an engine and
    checking it both need it, for the same few examples.

    Returns:
        The weights v = (1, …, b), the outputs (b,), and Σᵢ vᵢ ∇θ f(zᵢ) by parameter, where f depends on it.
    """
    if function.tried is None or function.tried[0] is not batch:
        weights = torch.arange(1, size + 1)
        outputs, gradients = batch_gradient(function, batch, weights)
        named = zip(function.parameters, gradients, strict=True)
        found = {name: gradient for name, gradient in named if gradient is not None}
        function.tried = batch, (weights.to(outputs), outputs, found)
    return function.tried[1]
