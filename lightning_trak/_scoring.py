"""From the stored features of the checkpoints to scores: of targets, or of the training examples for themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak._checkpoints import featurize_targets, naming
from lightning_trak._plan import Plan
from lightning_trak.progress import progress
from lightning_trak.scores import (
    Extremes,
    Scores,
    TrainFeatures,
    extreme_scores,
    n_blocks,
    precondition,
    scores,
    self_influence,
    with_mean_loss_grad,
)
from lightning_trak.store import FeatureStore
from lightning_trak.weights import load_weights


@dataclass(frozen=True)
class Scoring:
    """The estimator, over some checkpoints of a store that are featurized.

    Attributes:
        trainer: supplies device and progress bar.
        model: featurizes the targets.
        store: has the train features.
        plan: how targets are featurized.
        digests: of the checkpoints to average over.
        damping: λ, or ``"auto"``.
        curvature: whether H is weighted; see `TRAKCallback`.
    """

    trainer: Any
    model: Any
    store: FeatureStore
    plan: Plan
    digests: list[str]
    damping: float | str
    curvature: bool

    def targets(self, loader: DataLoader[Any], top_k: int | None) -> tuple[Scores | Extremes, int]:
        """Featurize targets, solve with the kernel of every checkpoint, and score; return also how many targets."""
        trains = self._trains()
        solved = self._solve(loader, trains)
        n_train, n_targets, device = self.store.n_train, len(solved[0]), self._device
        with progress(self.trainer, "Scoring", n_blocks(n_train, n_targets)) as advance:
            if top_k is None:
                return scores(trains, solved, lambda: advance(1), device), n_targets
            return extreme_scores(trains, solved, min(top_k, n_train), lambda: advance(1), device), n_targets

    def self_influence(self) -> Tensor:
        """Score every training example for itself, (n,)."""
        total = torch.zeros(self.store.n_train)
        with progress(self.trainer, "Scoring", len(self.digests)) as advance:
            for digest, train in zip(self.digests, self._trains(), strict=True):
                with naming(self.store[digest]):
                    total += self_influence(train, damping=self.damping, curvature=self.curvature, device=self._device)
                advance(1)
        return total / len(self.digests)

    def _solve(self, loader: DataLoader[Any], trains: list[TrainFeatures]) -> list[Tensor]:
        """Featurize the targets at every checkpoint and solve with its kernel."""
        loop, solved, total = self.plan.loop(self.trainer, self.model, loader, "target"), [], len(self.digests)
        for number, (digest, train) in enumerate(zip(self.digests, trains, strict=True), 1):
            entry = self.store[digest]
            if number == 1:
                loop.preflight(load_weights(entry.weights_path, digest), digest)
            targets = featurize_targets(loop, entry, f"{number}/{total}").to(self._device)
            with naming(entry):
                x = precondition(train, targets, damping=self.damping, curvature=self.curvature)
            solved.append(x.cpu())  # those of all checkpoints would fill the device
        return solved

    def _trains(self) -> list[TrainFeatures]:
        """Return the train set's verified features at every checkpoint; the paper averages Q over them first."""
        trains = []
        for digest in self.digests:
            entry = self.store[digest]
            entry.verify()
            trains.append(TrainFeatures(entry.features, entry.loss_grad, entry.curvature))
        as_in_the_paper = not self.curvature and self.damping == 0
        return with_mean_loss_grad(trains) if as_in_the_paper else trains

    @property
    def _device(self) -> torch.device:
        device = self.trainer.strategy.root_device
        return device if device.type == "cuda" else torch.device("cpu")  # others lack float64
