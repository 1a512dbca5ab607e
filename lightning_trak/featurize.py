"""From a batch to its features: per-sample gradients, projected as they appear."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients import DenseGradient, Engine, Gradient, ModelFunction, batch_gradient
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

    def __call__(self, batch: Any, size: int) -> Features:
        """Featurize a batch of ``size`` examples."""
        features = self._zeros(size)

        def project(rows: slice, name: str, gradient: Gradient) -> None:
            self._add_(features[rows], name, gradient)

        return Features(features, self.engine(self.function, batch, size, project))

    def checked(self, batch: Any, size: int) -> Features:
        """Featurize a batch, and compare the features with autograd's gradient of the whole batch.

        With random numbers v, Σᵢ vᵢ φᵢ must be the projection of ∇θ Σᵢ vᵢ f(zᵢ), for every parameter: then no use of it
        was missed, and every part of its gradient went to the example that it belongs to.

        Raises:
            ValueError: if it is not; the parameter is named.
        """
        features = self._zeros(size)
        generator = torch.Generator().manual_seed(self._key % 2**63)
        weights = torch.randn(size, generator=generator).to(features)
        sums = {name: features.new_zeros(features.shape[1]) for name in self._starts}
        squares = dict.fromkeys(sums, 0.0)

        def project(rows: slice, name: str, gradient: Gradient) -> None:
            part = torch.zeros_like(features[rows])
            self._add_(part, name, gradient)
            features[rows] += part
            sums[name] += weights[rows] @ part
            squares[name] += (weights[rows, None] * part).square().sum().item()

        result = Features(features, self.engine(self.function, batch, size, project))
        if bool(torch.isfinite(features).all()):
            self._compare(batch, weights, sums, squares)
        return result

    def _compare(self, batch: Any, weights: Tensor, sums: dict[str, Tensor], squares: dict[str, float]) -> None:
        outputs, gradients = batch_gradient(self.function, batch, weights)
        tolerance = self._projector.rounding + (1e-3 if outputs.dtype in (torch.float32, torch.float64) else 0.05)
        rounding = (
            1e-2 * tolerance * sum(squares.values()) ** 0.5
        )  # of gradients that cancel, as of a bias before a norm
        for name, gradient in zip(self.function.parameters, gradients, strict=True):
            expected = self._zeros(1)
            if gradient is not None:
                self._add_(expected, name, DenseGradient(gradient.unsqueeze(0)))
            difference = (sums[name] - expected[0]).norm().item()
            if not difference <= tolerance * (squares[name] ** 0.5 + expected.norm().item()) + rounding:
                raise ValueError(
                    f"The per-sample gradients of {name} do not add up to its gradient over the batch: they differ by"
                    f" {difference:.3g}, of {expected.norm().item():.3g}, with gradients='{self.engine}'. A layer_rule"
                    " is wrong, or model_output depends on more than the example. Use gradients='vmap' or 'loop'."
                )

    def _zeros(self, size: int) -> Tensor:
        device = next(iter(self.function.parameters.values())).device
        return torch.zeros(size, self._projector.dimension(self.function.n_params), device=device)

    def _add_(self, features: Tensor, name: str, gradient: Gradient) -> None:
        self._projector.add_gradient_(features, gradient, self._starts[name], self._key)
