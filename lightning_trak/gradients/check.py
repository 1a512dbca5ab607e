"""Whether per-sample gradients are right: they must add up to autograd's gradient of the whole batch."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch

from lightning_trak.gradients.engine import Engine, Sink
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.gradient import Gradient
from lightning_trak.gradients.loop import numbered_gradient

_ROUNDING = 1e-2  # of the tolerance, relative to all gradients: those of a bias before a norm cancel, for example


class GradientsDiffer(ValueError):
    """Per-sample gradients do not add up to autograd's."""


def check_gradients(
    function: ModelFunction, engine: Engine, batch: Any, size: int, sink: Sink = lambda *_: None
) -> None:
    """Compare an engine's gradients with autograd's, each example weighted with its number vᵢ = i.

    For every parameter, Σᵢ vᵢ ∇θ f(zᵢ) must equal ∇θ Σᵢ vᵢ f(zᵢ). Then no use of the parameter was missed, and every
    part of its gradient went to the right example.

    Raises:
        GradientsDiffer: if they differ; the parameter is named.
    """
    weights, _, expected = numbered_gradient(function, batch, size)
    own = function.parameters
    sums = {name: torch.zeros_like(value) for name, value in own.items() if name not in expected} | expected
    difference = {name: sums[name].float() for name in own}
    norms = {name: gradient.norm().item() for name, gradient in difference.items()}
    squares = dict.fromkeys(own, 0.0)

    def compare(rows: slice, name: str, gradient: Gradient) -> None:
        for row in range(gradient.size):
            part = gradient[row : row + 1].weighted_sum(weights[rows][row : row + 1].float())
            squares[name] += part.square().sum().item()
            difference[name] = difference[name] - part
        sink(rows, name, gradient)

    outputs = engine(function, batch, size, compare)
    if not bool(torch.isfinite(outputs).all()) or not all(map(isfinite, squares.values())):
        return  # featurization names the examples whose values are not finite
    rounding = _ROUNDING * function.tolerance * sum(squares.values()) ** 0.5
    for name, norm in norms.items():
        found = difference[name].norm().item()
        if not found <= function.tolerance * (squares[name] ** 0.5 + norm) + rounding:
            raise GradientsDiffer(
                f"The per-sample gradients of {name} do not add up to its gradient over the batch: they differ by"
                f" {found:.3g}, where its norm is {norm:.3g}, with gradients='{engine}'. A layer_rule is wrong, or"
                f" {function.method} of an example depends on the rest of the batch. Use gradients='vmap' or 'loop'."
            )
