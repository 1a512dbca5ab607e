"""Q and w of a module's examples, from what the module defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_trak.data.batch import fresh
from lightning_trak.tasks.base import TRAKMixin, loss_derivatives, own_method


class LossTerms:
    """Q and w of a module's examples: by the module's own formulas, else by autograd.

    Where the module defines neither ``out_to_loss_grad`` nor ``out_to_loss_curvature``, its loss is differentiated at
    the outputs that are known already. Then there is no further forward pass.

    Args:
        module: has ``model_output``, with or without `TRAKMixin`.

    Attributes:
        loss_needs_model: whether the module defines a per-sample loss, which is no function of the output.
        need_projection: whether Q must be found by projection: the module defines a per-sample loss, and no Q.
        loss_known: whether the loss is known: a module may define Q alone.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._own_grad = own_method(module, "out_to_loss_grad")
        self._own_curvature = own_method(module, "out_to_loss_curvature")
        self._own_loss = own_method(module, "output_to_loss")
        self._kernel_weight = own_method(module, "kernel_weight")
        self._per_sample_loss = own_method(module, "per_sample_loss")
        self.loss_needs_model = self._per_sample_loss is not None
        self.need_projection = self.loss_needs_model and self._own_grad is None
        self.loss_known = self.loss_needs_model or self._own_loss is not None or self._own_grad is None

    def losses(self, call: Callable[..., Any], batch: Any, output: Tensor) -> Tensor:
        """Return the training loss of every example, (b,); the arguments are those of `__call__`."""
        if self._per_sample_loss is not None:
            return _checked("per_sample_loss", call(self._per_sample_loss, batch), output)
        return _checked("output_to_loss", call(self._output_to_loss, output, batch), output)

    def own_curvature(self, call: Callable[..., Any], batch: Any, output: Tensor) -> Tensor | None:
        """Return w, (b,), as the module defines it; None if w follows from the loss. See `__call__`."""
        if self._own_curvature is None:
            return None
        return _checked("out_to_loss_curvature", call(self._own_curvature, batch), output)

    def __call__(self, call: Callable[..., Any], batch: Any, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q and w, each (b,), for a batch whose model outputs are known.

        Args:
            call: calls a bound method of the module at the right weights, as `ModelFunction.call` does.
            batch: the batch.
            output: f, (b,).
        """
        loss_grad, curvature = loss_derivatives(lambda f: call(self._output_to_loss, f, batch), output)
        if self._own_grad is not None:
            own = _checked("out_to_loss_grad", call(self._own_grad, batch), output)
            if self._own_curvature is None:
                _check_consistent(own, loss_grad)
            loss_grad = own
        own_curvature = self.own_curvature(call, batch, output)
        if own_curvature is not None:
            curvature = own_curvature
        elif self._kernel_weight is not None:
            curvature = _checked("kernel_weight", call(self._kernel_weight, output, batch), output)
        return loss_grad, curvature

    def of_batch(self, batch: Any) -> Tensor | None:
        """Return the loss of a batch that training minimises; None where the module defines Q alone, and no loss."""
        whole, reduce = own_method(self._module, "batch_loss"), own_method(self._module, "reduce_losses")
        if whole is not None:
            return whole(batch)  # type: ignore[no-any-return]
        if self._per_sample_loss is not None:
            losses = self._per_sample_loss(fresh(batch))
        elif self._own_loss is None and self._own_grad is not None:
            return None
        else:
            losses = self._output_to_loss(self._module.model_output(fresh(batch)), fresh(batch))
        return losses.mean() if reduce is None else reduce(losses, batch)

    def _output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        own = self._own_loss
        return TRAKMixin.output_to_loss(self._module, output, batch) if own is None else own(output, batch)


def _checked(name: str, value: Any, output: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != output.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name}(batch) returned {got}; expected one number for each example, shape {tuple(output.shape)}."
        )
    return value.detach()


def _check_consistent(own: Tensor, from_loss: Tensor) -> None:
    """Raise a ValueError if Q and w belong to different losses: they give the Newton step of neither."""
    if not torch.allclose(own.to(from_loss.dtype), from_loss, rtol=1e-2, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"out_to_loss_grad gives {own[0].item():.4g} for an example where −∂output_to_loss/∂f is"
            f" {from_loss[0].item():.4g}: they belong to different losses, so the curvature ∂²L/∂f² is unknown. Define"
            " output_to_loss (out_to_loss_grad then follows from it), or both out_to_loss_grad and"
            " out_to_loss_curvature."
        )
