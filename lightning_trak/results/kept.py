"""What is asked of features after scoring: leaving out, calibration, spread, splitting. The trainer's room answers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightning_trak.influence import Spread
from lightning_trak.results.score_parts import SplitScore
from lightning_trak.results.stored_scores import StoredScores


class Kept(Protocol):
    """Features that answer further questions about scores."""

    def without(self, masks: Tensor) -> Tensor:
        """Return how outputs change when sets of training examples are left out, (s, n) → (s, m)."""
        ...

    def calibrated(self, masks: Tensor, outputs: Tensor) -> Tensor | StoredScores:
        """Return scores, (n, m), weighted so that they predict the outputs after training on subsets."""
        ...

    def spread(self) -> Spread:
        """Return how scores vary from checkpoint to checkpoint."""
        ...

    def split(self, i: int, j: int) -> SplitScore:
        """Return the score of training example i for target j, split by layer and by parts."""
        ...

    @property
    def data_sets(self) -> tuple[Any, Any]:
        """Train set and targets; None for a train set that is not at hand."""
        ...
