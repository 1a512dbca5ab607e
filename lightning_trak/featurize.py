"""From a batch to its features: per-sample gradients, projected as they appear."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients import Engine, ModelFunction
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
        device = next(iter(self.function.parameters.values())).device
        features = torch.zeros(size, self._projector.dimension(self.function.n_params), device=device)

        def project(rows: slice, name: str, gradients: Tensor) -> None:
            self._projector.add_(features[rows], gradients.flatten(1).float(), self._starts[name], self._key)

        outputs = self.engine(self.function, batch, size, project)
        return Features(features, outputs)
