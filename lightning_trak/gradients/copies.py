"""Parameters that a model uses by itself, as a scale or a token: every example is given a copy of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients.engine import close
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.loop import batch_gradient
from lightning_trak.gradients.tracing import Layer

_LARGEST = 2**20  # entries of a parameter: larger ones are no scales or tokens, and copies of them might not fit
_MOST_AXES = 3  # between the examples and a parameter's own axes: channels or positions, height and width


class CopyTrial:
    """Finds the parameters in whose place a model takes a copy for each example, as broadcasting has it.

    The gradient of copy i is then that of example i, and it comes with the backward pass of the batch. It is found out
    on a few examples: the outputs must stay what they are, and where each is weighted, the gradient of an example's
    copy must have grown by the example's weight.

    Args:
        function: the model at some weights.
        batch: a few examples.
        weights: v, (b,), no two the same.
        outputs: f of these examples, (b,).
    """

    def __init__(self, function: ModelFunction, batch: Any, weights: Tensor, outputs: Tensor) -> None:
        self._function, self._batch = function, batch
        self._weights, self._outputs = weights, outputs

    def find(self, layers: Iterable[Layer]) -> dict[str, torch.Size]:
        """Try the parameters of modules without a rule, alike in modules of one class; return the shapes of copies."""
        groups: dict[tuple[type, str], list[str]] = {}
        for layer in layers:
            for local, name in layer.parameters.items():
                if layer.rule is None and self._function.parameters[name].numel() <= _LARGEST:
                    groups.setdefault((type(layer.module), local), []).append(name)
        found: dict[str, torch.Size] = {}
        for names in groups.values():
            found.update(next((copies for copies in self._ways(names) if self._fit(copies)), {}))
        return found

    def _ways(self, names: Sequence[str]) -> list[dict[str, torch.Size]]:
        """List the shapes that copies may have: without a first axis of one, or with axes of one before all others."""
        shapes = {name: self._function.parameters[name].shape for name in names}
        ways = [
            {name: torch.Size([1] * axes + list(shape)) for name, shape in shapes.items()}
            for axes in range(_MOST_AXES + 1)
        ]
        if all(shape[:1] == (1,) for shape in shapes.values()):
            ways.insert(0, {name: shape[1:] for name, shape in shapes.items()})
        return ways

    def _fit(self, copies: dict[str, torch.Size]) -> bool:
        function = self._function.restrict(copies).with_copies(copies, len(self._weights))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of shapes that do not go together
                outputs, plain = batch_gradient(function, self._batch)
                _, weighted = batch_gradient(function, self._batch, self._weights)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model may do with an axis more whatever it likes
            return False
        same = close(outputs, self._outputs, function.tolerance)
        return same and all(self._scales(*pair) for pair in zip(plain, weighted, strict=True))

    def _scales(self, plain: Tensor | None, weighted: Tensor | None) -> bool:
        """Tell whether a gradient grows by the examples' weights; of none at all nothing can be told."""
        if plain is None or weighted is None or not bool(plain.any()):
            return False
        first, second = (
            gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None] for gradient in (plain, weighted)
        )
        return close(first * self._weights[:, None].to(first), second, self._function.tolerance)
