"""From a batch to its features: per-sample gradients, projected as they appear."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients import Engine, Gradient, ModelFunction, Sink
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
        return Features(features, self.engine(self.function, batch, size, self._into(features)))

    def by_parameter(self, batch: Any, size: int) -> dict[str, Tensor]:
        """Return what each parameter adds to the features of a batch, (b, k); they sum to the features."""
        features: dict[str, Tensor] = {}

        def project(rows: slice, name: str, gradient: Gradient) -> None:
            own = features.setdefault(name, self._zeros(size))
            self._projector.add_gradient_(own[rows], gradient, self._starts[name], self._key)

        self.engine(self.function, batch, size, project)
        return features

    def rehearsal(self, size: int) -> Sink:
        """Return a sink for the gradients of ``size`` examples that needs as much memory as featurizing them."""
        return self._into(self._zeros(size), self._projector.rehearsal())

    def _into(self, features: Tensor, projector: Projector | None = None) -> Sink:
        """Return a sink that adds projected gradients to ``features``, (b, k)."""

        def project(rows: slice, name: str, gradient: Gradient) -> None:
            (projector or self._projector).add_gradient_(features[rows], gradient, self._starts[name], self._key)

        return project

    def _zeros(self, size: int) -> Tensor:
        device = next(iter(self.function.parameters.values())).device
        return torch.zeros(size, self._projector.dimension(self.function.n_params), dtype=torch.float32, device=device)
