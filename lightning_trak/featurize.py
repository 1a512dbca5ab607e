"""From a batch to its features: per-sample gradients, projected as they appear."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients import Engine, Gradient, ModelFunction, batch_gradient
from lightning_trak.projection import Projector


@dataclass
class Features:
    """What a batch is turned into.

    Attributes:
        features: φ = Pᵀ ∇θ f, (b, k), float32.
        outputs: f, (b,).
    """

    features: Tensor
    outputs: Tensor


class Featurizer:
    """Turns batches into features at one checkpoint; pure torch.

    Args:
        function: the model at the weights of the checkpoint.
        engine: computes per-sample gradients.
        projector: the family of projections.
        key: chooses the projection; a function of seed and checkpoint, see `projection_key`.
    """

    def __init__(self, function: ModelFunction, engine: Engine, projector: Projector, key: int) -> None:
        self.function = function
        self.engine = engine
        self._projector = projector
        self._key = key
        sizes = [value.numel() for value in function.parameters.values()]
        self._starts = dict(zip(function.parameters, accumulate([0, *sizes]), strict=False))

    def of(self, method: str, engine: Engine) -> Featurizer:
        """Return the featurizer of another method of the module, with the same projection."""
        return Featurizer(self.function.of(method), engine, self._projector, self._key)

    def __call__(self, batch: Any, size: int) -> Features:
        """Featurize a batch of ``size`` examples."""
        features = self._zeros(size)

        def project(rows: slice, name: str, gradient: Gradient) -> None:
            self._add_(features[rows], name, gradient)

        return Features(features, self.engine(self.function, batch, size, project))

    def checked(self, batch: Any, size: int) -> Features:
        """Featurize a batch, and compare its gradients with autograd's of the whole batch.

        With random numbers v, Σᵢ vᵢ ∇θ f(zᵢ) must be ∇θ Σᵢ vᵢ f(zᵢ), for every parameter: then no use of it was missed,
        and every part of its gradient went to the example that it belongs to.

        Raises:
            ValueError: if it is not; the parameter is named.
        """
        features = self._zeros(size)
        generator = torch.Generator().manual_seed(self._key % 2**63)
        weights = torch.randn(size, generator=generator).to(features)
        difference, norms = self._batch_gradient(batch, weights)
        squares = dict.fromkeys(difference, 0.0)

        def project(rows: slice, name: str, gradient: Gradient) -> None:
            part = torch.zeros_like(features[rows])
            self._add_(part, name, gradient)
            features[rows] += part
            squares[name] += (weights[rows, None] * part).square().sum().item()
            difference[name] -= gradient.weighted_sum(weights[rows])

        result = Features(features, self.engine(self.function, batch, size, project))
        if bool(torch.isfinite(features).all()):
            self._compare(difference, norms, squares)
        return result

    def _batch_gradient(self, batch: Any, weights: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        _, gradients = batch_gradient(self.function, batch, weights)
        named = zip(self.function.parameters.items(), gradients, strict=True)
        found = {name: (torch.zeros_like(own) if grad is None else grad).to(weights) for (name, own), grad in named}
        return found, {name: gradient.norm().item() for name, gradient in found.items()}

    def _compare(self, difference: dict[str, Tensor], norms: dict[str, float], squares: dict[str, float]) -> None:
        tolerance = self.function.tolerance
        rounding = (
            1e-2 * tolerance * sum(squares.values()) ** 0.5
        )  # of gradients that cancel, as a bias's before a norm
        for name, norm in norms.items():
            found = difference[name].norm().item()
            if not found <= tolerance * (squares[name] ** 0.5 + norm) + rounding:
                raise ValueError(
                    f"The per-sample gradients of {name} do not add up to its gradient over the batch: they differ by"
                    f" {found:.3g}, of {norm:.3g}, with gradients='{self.engine}'. A layer_rule"
                    f" is wrong, or {self.function.method} depends on more than the example. Use gradients='vmap' or"
                    " 'loop'."
                )

    def _zeros(self, size: int) -> Tensor:
        device = next(iter(self.function.parameters.values())).device
        return torch.zeros(size, self._projector.dimension(self.function.n_params), dtype=torch.float32, device=device)

    def _add_(self, features: Tensor, name: str, gradient: Gradient) -> None:
        self._projector.add_gradient_(features, gradient, self._starts[name], self._key)
