"""From one call of a layer, seen in the backward pass, to the gradients of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_trak.gradients.gradient import DenseGradient, Gradient
from lightning_trak.gradients.modulewise import module_gradients
from lightning_trak.gradients.rules import LayerCall
from lightning_trak.gradients.tracing import Call, Layer, detached_arguments, repeated


def layer_gradients(call: Call, grads: tuple[Tensor | None, ...], size: int) -> dict[str, Gradient]:
    """Apply a layer's rule to one call of it.

    Returns:
        The gradients of its attributed parameters for ``size`` examples, by their names in the model.
    """
    layer = call.layer
    args, kwargs = detached_arguments(call)
    if layer.rule is None:
        found: Any = module_gradients(layer.module, list(layer.parameters), args, kwargs, grads, size)
    elif layer.whole:
        found = layer.rule(layer.module, LayerCall(_input(args, kwargs), _some(grads), args, kwargs, grads))
    else:
        assert grads[0] is not None
        first = move_batch_first(repeated(_input(args, kwargs), layer, size), layer.batch_axis, size)
        found = layer.rule(
            layer.module, LayerCall(first, move_batch_first(grads[0], layer.batch_axis, size), args, kwargs, grads)
        )
    gradients = {}
    for local, name in layer.parameters.items():
        if local in found:
            gradients[name] = _checked(found[local], layer, local, size)
    return gradients


def _input(args: Sequence[Any], kwargs: Any) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _some(grads: tuple[Tensor | None, ...]) -> Tensor:
    return next(grad for grad in grads if grad is not None)


def _checked(gradient: Gradient | Tensor, layer: Layer, local: str, size: int) -> Gradient:
    """Fold rows of positions into examples, and see that a rule returned what it should."""
    gradient = DenseGradient(gradient) if isinstance(gradient, Tensor) else gradient
    if gradient.size != size and size and gradient.size % size == 0:
        gradient = gradient.fold(size)
    owner, _, short = local.rpartition(".")
    expected = getattr(layer.module.get_submodule(owner), short).shape
    if (gradient.size, gradient.shape) != (size, expected):
        raise ValueError(
            f"The rule for {type(layer.module).__name__} returned gradients of {local} of shape"
            f" {(gradient.size, *gradient.shape)}; expected {(size, *expected)}, the batch first."
        )
    return gradient


def move_batch_first(tensor: Tensor, axis: str, size: int) -> Tensor:
    """Bring the examples to the front; see `Layer.batch_axis`."""
    if axis == "second":
        return tensor.movedim(1, 0)
    if axis == "minor":
        return tensor.unflatten(0, (-1, size)).movedim(1, 0).flatten(0, 1)
    return tensor
