"""The registry of rules. A rule computes the per-sample gradients of a layer's parameters from one call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_trak.gradients.gradient import Gradient


@dataclass
class LayerCall:
    """One call of a layer, after the backward pass. Tensors are detached.

    In ``input`` and ``grad`` the batch axis is first; the others are as the layer got and returned them.

    Attributes:
        input: the first argument, (b, ...).
        grad: ∂(Σf)/∂output, (b, ...), of the first output.
        args: all positional arguments.
        kwargs: all keyword arguments.
        grads: the gradients of all floating-point tensors in the output, in the order of the flattened structure; None
            for those that were not used.
    """

    input: Tensor
    grad: Tensor
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    grads: tuple[Tensor | None, ...] = ()


Rule = Callable[[Any, LayerCall], Mapping[str, Gradient | Tensor]]
"""Takes (layer, call); returns the gradients of its parameters by their names in the layer: a `Gradient`, or a tensor
of shape (b, *parameter.shape). It may return more names than are needed."""


@dataclass(frozen=True)
class Registered:
    """A rule and what it applies to."""

    rule: Rule
    whole: bool


_RULES: dict[type[nn.Module] | str, Registered] = {}


def layer_rule(*layers: type[nn.Module] | str, whole: bool = False) -> Callable[[Rule], Rule]:
    """Return a decorator that registers a rule for one or several types of layers. It replaces an earlier rule.

    A layer without a rule is differentiated per sample, which is as exact and slower. The rule gets the layer and a
    `LayerCall` with its ``input`` (b, ..., width) and ``grad``, the gradient of its output, whose first axis is the
    batch. It returns the gradients of the parameters by name, each (b, ...).

    The rule holds for layers whose ``forward`` is the type's own. A subclass with another ``forward`` needs its own
    rule.

    Args:
        layers: the types, or their qualified names if the library that defines them may be missing.
        whole: the rule takes ``args``, ``kwargs`` and ``grads`` as they are, with the batch on any axis. It also
            returns gradients of submodules' parameters, which the layer uses without calling the submodules.

    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = nn.Parameter(torch.ones(3))
    ...     def forward(self, x):
    ...         return self.factor * x
    >>> import torch
    >>> @layer_rule(Scale)
    ... def scale(layer, call):
    ...     products = call.grad * call.input  # (b, ..., 3)
    ...     return {"factor": products.reshape(len(products), -1, 3).sum(1)}
    >>> find_rule(Scale()).rule is scale
    True
    """
    wrong = [layer for layer in layers if not isinstance(layer, str) and not _is_module_type(layer)]
    if wrong or not layers:
        raise TypeError(
            f"layer_rule takes types of modules, as in @layer_rule(torch.nn.Linear); got {wrong or 'none'}."
        )

    def register(rule: Rule) -> Rule:
        for layer in layers:
            _RULES[layer] = Registered(rule, whole)
        return rule

    return register


def _is_module_type(layer: Any) -> bool:
    return isinstance(layer, type) and issubclass(layer, nn.Module)


def find_rule(layer: nn.Module) -> Registered | None:
    """Return the rule for a layer; None if there is none, or if the layer has a ``forward`` of its own."""
    if "forward" in vars(layer):
        return None
    for kind in type(layer).__mro__:
        found = _RULES.get(kind) or _RULES.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found if type(layer).forward is kind.forward else None  # type: ignore[attr-defined]
    return None
