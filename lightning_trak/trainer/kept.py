"""What an attribution keeps to answer later questions: targets' features, and the way to those of the train set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_trak.influence import Estimator, GaussNewton, Kinds, Solved, TrainFeatures, fit_weights, n_blocks
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.trainer.checkpoints import naming, sums_of
from lightning_trak.trainer.framework import Trainer
from lightning_trak.trainer.progress import progress

T = TypeVar("T")


@dataclass(frozen=True)
class KeptFeatures:
    """The features that scores were computed from.

    Attributes:
        trainer: supplies the progress bar.
        estimator: computed the scores.
        entries: the checkpoints that they are averaged over, with the train features.
        targets: φ(z) of the targets at each checkpoint, (m, k); sparse if whitened.
        layers: the columns of each layer in whitened features.
    """

    trainer: Trainer
    estimator: Estimator
    entries: Sequence[CheckpointEntry]
    targets: Sequence[Any]
    layers: Sequence[slice]

    def without(self, masks: Tensor) -> Tensor:
        """Return how the outputs change when sets of training examples are left out, (s, n) → (s, m)."""

        def change(_: int, train: TrainFeatures, targets: Any, sums: GaussNewton | None) -> Tensor:
            return self.estimator.without(train, targets, masks, sums)

        return torch.stack(self._at_each_checkpoint("Leaving out", change)).mean(0)

    def calibrated(self, masks: Tensor, outputs: Tensor) -> Tensor:
        """Return scores, (n, m), that predict outputs after retraining as well as possible; see `fit_weights`.

        Args:
            masks: (s, n), bool; row t says which training examples are in subset t.
            outputs: of the targets after training on each subset, (s, m).
        """
        count = len(self.entries)

        def predict(_: int, train: TrainFeatures, targets: Any, sums: GaussNewton | None) -> tuple[Tensor, Tensor]:
            kinds = Kinds(self.estimator, train, targets, sums, self.layers)
            return kinds.predictions(masks), torch.tensor(kinds.usual) / count

        predicted, usual = zip(*self._at_each_checkpoint("Predicting subsets", predict), strict=True)
        weights = fit_weights(torch.cat(predicted), outputs, torch.cat(usual)).split([len(one) for one in usual])

        def weigh(number: int, train: TrainFeatures, targets: Any, sums: GaussNewton | None) -> Solved:
            return Kinds(self.estimator, train, targets, sums, self.layers).combined(weights[number] * count)

        solved = self._at_each_checkpoint("Weighting", weigh)
        with progress(self.trainer, "Scoring", n_blocks(len(masks[0]), len(outputs[0]))) as advance:
            return self.estimator.scores(solved, lambda: advance(1)).mean

    def _at_each_checkpoint(self, description: str, compute: Callable[..., T]) -> list[T]:
        """Call ``compute`` with (number, train set, targets, sums over the train set) of each checkpoint."""
        results = []
        with progress(self.trainer, description, len(self.entries)) as advance:
            trains = zip(self.entries, self.estimator.trains, self.targets, strict=True)
            for number, (entry, train, targets) in enumerate(trains):
                with naming(entry):
                    results.append(compute(number, train, targets, sums_of(entry, self.estimator, train)))
                advance(1)
        return results
