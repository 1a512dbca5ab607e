"""What an attribution keeps to answer later questions: targets' features, and the way to those of the train set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_trak.influence import Estimator, GaussNewton, Kinds, Solved, Spread, TrainFeatures, fit_weights
from lightning_trak.results.split_score import SplitScore
from lightning_trak.results.stored_scores import StoredScores
from lightning_trak.trainer.attachment import attached
from lightning_trak.trainer.checkpoints import naming, sums_of
from lightning_trak.trainer.job import Job, TargetFeatures
from lightning_trak.trainer.progress import progress
from lightning_trak.trainer.scoring import compute_scores, compute_spread
from lightning_trak.trainer.split import split_score

T = TypeVar("T")


@dataclass(frozen=True)
class KeptFeatures:
    """The features that scores were computed from.

    Attributes:
        job: the checkpoints, the model and the data.
        estimator: computed the scores.
        targets: their features at each checkpoint.
    """

    job: Job
    estimator: Estimator
    targets: TargetFeatures

    def without(self, masks: Tensor) -> Tensor:
        """Return how the outputs change when sets of training examples are left out, (s, n) → (s, m)."""

        def change(_: int, train: TrainFeatures, targets: Any, sums: GaussNewton | None) -> Tensor:
            return self.estimator.without(train, targets, masks, sums)

        return torch.stack(self._at_each_checkpoint("Leaving out", change)).mean(0)

    def calibrated(self, masks: Tensor, outputs: Tensor) -> Tensor | StoredScores:
        """Return scores, (n, m), that predict outputs after retraining as well as possible; see `fit_weights`.

        Args:
            masks: (s, n), bool; row t says which training examples are in subset t.
            outputs: of the targets after training on each subset, (s, m).
        """
        layers = list(self.job.layers.values())
        count = len(self.job.entries)

        def predict(_: int, train: TrainFeatures, targets: Any, sums: GaussNewton | None) -> tuple[Tensor, Tensor]:
            kinds = Kinds(self.estimator, train, targets, sums, layers)
            return kinds.predictions(masks), torch.tensor(kinds.usual) / count

        predicted, usual = zip(*self._at_each_checkpoint("Predicting subsets", predict), strict=True)
        weights = fit_weights(torch.cat(predicted), outputs, torch.cat(usual)).split([len(one) for one in usual])

        def weigh(number: int, train: TrainFeatures, targets: Any, sums: GaussNewton | None) -> Solved:
            return Kinds(self.estimator, train, targets, sums, layers).combined(weights[number] * count)

        solved = self._at_each_checkpoint("Weighting", weigh)
        weighted = [weight.tolist() for weight in weights]
        return compute_scores(self.job, self.estimator, solved, self.targets.digest, weighted)[0]

    def spread(self) -> Spread:
        """Return how scores vary from checkpoint to checkpoint."""

        def solve(_: int, train: TrainFeatures, targets: Any, sums: GaussNewton | None) -> Solved:
            return self.estimator.solve(train, targets, sums)

        solved = self._at_each_checkpoint("Solving", solve)
        return compute_spread(self.job, self.estimator, solved, self.targets.digest)

    def split(self, i: int, j: int) -> SplitScore:
        """Split the score of training example i for target j by layer and by parts."""
        with attached(self.job.trainer, self.job.model, self.job.datamodule):
            return split_score(self.job, self.estimator, self.targets.features, i, j)

    @property
    def data_sets(self) -> tuple[Any, Any]:
        """Train set and targets; None for a train set that is not at hand."""
        loader = self.job.loaders.train_if_defined()
        return None if loader is None else loader.dataset, self.targets.reader.dataset

    def _at_each_checkpoint(self, description: str, compute: Callable[..., T]) -> list[T]:
        """Call ``compute`` with (number, train set, targets, sums over the train set) of each checkpoint."""
        results = []
        with progress(self.job.trainer, description, len(self.job.entries)) as advance:
            trains = zip(self.job.entries, self.estimator.trains, self.targets.features, strict=True)
            for number, (entry, train, targets) in enumerate(trains):
                with naming(entry):
                    results.append(compute(number, train, targets, sums_of(entry, self.estimator, train)))
                advance(1)
        return results
