"""What an attribution keeps to answer later questions: targets' features, and the way to those of the train set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_trak.influence import Estimator, GaussNewton, Kinds, Solved, Spread, TrainFeatures, fit_weights
from lightning_trak.results.score_parts import SplitScore
from lightning_trak.results.stored_scores import StoredScores
from lightning_trak.trainer.attributing.job import Job
from lightning_trak.trainer.attributing.parts import split_score
from lightning_trak.trainer.attributing.scoring import Scoring
from lightning_trak.trainer.attributing.solving import at_each_checkpoint, solved_at_each
from lightning_trak.trainer.attributing.target_features import TargetFeatures
from lightning_trak.trainer.host.attachment import attached


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

        def change(number: int, train: TrainFeatures, sums: GaussNewton | None) -> Tensor:
            return self.estimator.without(train, self.targets.features[number], masks, sums)

        return torch.stack(at_each_checkpoint(self.job, self.estimator, "Leaving out", change)).mean(0)

    def calibrated(self, masks: Tensor, outputs: Tensor) -> Tensor | StoredScores:
        """Return scores, (n, m), that predict outputs after retraining as well as possible; see `fit_weights`.

        Args:
            masks: (s, n), bool; row t says which training examples are in subset t.
            outputs: of the targets after training on each subset, (s, m).
        """
        layers = list(self.job.plan.layers.values())
        count = len(self.job.entries)

        def kinds_at(number: int, train: TrainFeatures, sums: GaussNewton | None) -> Kinds:
            return Kinds(self.estimator, train, self.targets.features[number], sums, layers)

        def predict(number: int, train: TrainFeatures, sums: GaussNewton | None) -> tuple[Tensor, Tensor]:
            kinds = kinds_at(number, train, sums)
            return kinds.predictions(masks), torch.tensor(kinds.usual) / count

        found = at_each_checkpoint(self.job, self.estimator, "Predicting subsets", predict)
        predicted, usual = zip(*found, strict=True)
        weights = fit_weights(torch.cat(predicted), outputs, torch.cat(usual)).split([len(one) for one in usual])

        def weigh(number: int, train: TrainFeatures, sums: GaussNewton | None) -> Solved:
            return kinds_at(number, train, sums).combined(weights[number] * count)

        solve = partial(at_each_checkpoint, self.job, self.estimator, "Weighting", weigh)
        weighted = [weight.tolist() for weight in weights]
        return Scoring(self.job, self.estimator, self.targets, solve, weighted).scores(spread=False)[0]

    def spread(self) -> Spread:
        """Return how scores vary from checkpoint to checkpoint."""
        solve = partial(solved_at_each, self.job, self.estimator, self.targets.features)
        return Scoring(self.job, self.estimator, self.targets, solve).spread()

    def split(self, i: int, j: int) -> SplitScore:
        """Split the score of training example i for target j by layer and by parts."""
        with attached(self.job.trainer, self.job.model, self.job.datamodule):
            return split_score(self.job, self.estimator, self.targets.features, i, j)

    @property
    def data_sets(self) -> tuple[Any, Any]:
        """Train set and targets; None for a train set that is not at hand."""
        loader = self.job.loaders.train_if_defined()
        return None if loader is None else loader.dataset, self.targets.reader.dataset
