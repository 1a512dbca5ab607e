"""Applies a layer's rule to one call of the layer, seen in the backward pass, and checks what the rule returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients.engine import EngineUnsuitable
from lightning_trak.gradients.gradient import DenseGradient, Gradient
from lightning_trak.gradients.modulewise import module_gradients
from lightning_trak.gradients.rules import LayerCall, Rule
from lightning_trak.gradients.tracing import Call, Layer, detached_arguments, repeated


def layer_gradients(call: Call, grads: tuple[Tensor | None, ...], size: int) -> dict[str, Gradient]:
    """Apply a layer's rule to one call of it.

    Returns:
        The gradients of its attributed parameters for ``size`` examples, by their names in the model.
    """
    layer = call.layer
    args, kwargs = detached_arguments(call)
    if layer.rule is None:
        batched = layer.batched.get(call.number)
        if batched is None:
            raise EngineUnsuitable(f"{layer.name} is called more often than on the first examples")
        found: Any = module_gradients(layer.module, list(layer.parameters), args, kwargs, grads, size, batched)
    elif layer.whole:
        first = next(grad for grad in grads if grad is not None)
        found = _apply(layer, LayerCall(_input(args, kwargs), first, args, kwargs, grads))
    else:
        if grads[0] is None:
            raise EngineUnsuitable(f"the first output of {layer.name} is not used")
        first = move_batch_first(repeated(_input(args, kwargs), layer, size), layer.batch_axis, size)
        grad = move_batch_first(grads[0], layer.batch_axis, size)
        found = _apply(layer, LayerCall(first, grad, args, kwargs, grads))
    gradients = {}
    for local, name in layer.parameters.items():
        if local in found:
            gradients[name] = _checked(found[local], layer, local, size)
    return gradients


class WrongRule(ValueError):
    """A user's rule fails, or returns gradients of the wrong shape."""


def _apply(layer: Layer, call: LayerCall) -> Any:
    """Apply a rule. If one of ours fails, it does not support the layer; a user's own must be corrected."""
    rule = layer.rule
    assert rule is not None
    try:
        return rule(layer.module, call)
    except (EngineUnsuitable, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = f"The rule for {type(layer.module).__name__} fails with {type(error).__name__}: {error}"
        if _is_ours(rule):
            raise EngineUnsuitable(what) from error
        raise WrongRule(
            f"{what}. Its input is {tuple(call.input.shape)}, its output {tuple(call.grad.shape)}."
        ) from error


def _is_ours(rule: Rule | None) -> bool:
    return rule is not None and rule.__module__.startswith("lightning_trak.")


def _input(args: Sequence[Any], kwargs: Any) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _checked(gradient: Gradient | Tensor, layer: Layer, local: str, size: int) -> Gradient:
    """Sum over an example's positions if they are separate rows, and check the shape that a rule returned."""
    gradient = DenseGradient(gradient) if isinstance(gradient, Tensor) else gradient
    if gradient.size != size and size and gradient.size % size == 0:
        gradient = gradient.fold(size)
    owner, _, short = local.rpartition(".")
    expected = getattr(layer.module.get_submodule(owner), short).shape
    if (gradient.size, gradient.shape) != (size, expected):
        kind = EngineUnsuitable if _is_ours(layer.rule) else WrongRule
        raise kind(
            f"The rule for {type(layer.module).__name__} returned gradients of {local} of shape"
            f" {(gradient.size, *gradient.shape)}; expected {(size, *expected)}, the batch first."
        )
    return gradient


def move_batch_first(tensor: Tensor, axis: str, size: int) -> Tensor:
    """Move the batch axis to the front; see `Layer.batch_axis`."""
    if axis == "second":
        if tensor.ndim < 2 or tensor.shape[1] != size:
            raise EngineUnsuitable("the second axis of a layer's output is the batch axis for some batches only")
        return tensor.movedim(1, 0)
    if axis == "minor":
        if size == 0 or len(tensor) % size:
            raise EngineUnsuitable("the rows of a layer's output are a multiple of the examples for some batches only")
        return tensor.unflatten(0, (-1, size)).movedim(1, 0).flatten(0, 1)
    return tensor
