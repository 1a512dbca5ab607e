"""How much better one method is than another, with what both have in common left out of the interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.metrics import _bootstrap, _ranks, spearman


@dataclass(frozen=True)
class Difference:
    """A difference of two LDS, and its confidence interval."""

    value: float
    lower: float
    upper: float


def difference(
    one: Tensor, other: Tensor, outputs: Tensor, *, times: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Return LDS(one) − LDS(other) with a paired bootstrap interval.

    Both methods are evaluated on the same resamples of subsets and targets, those of
    `LinearDatamodelingScore.interval`. Targets that are hard for both then do not widen the interval.

    Args:
        one: the predictions of a method, (s, m).
        other: those of another.
        outputs: the actual outputs, (s, m).
        times: the number of resamples.
        confidence: the confidence level.
        seed: the seed of the resamples.
    """
    target = _ranks(outputs)
    resampled = [_bootstrap(_ranks(predictions), target, times, seed) for predictions in (one, other)]
    tail = (1 - confidence) / 2
    lower, upper = (resampled[0] - resampled[1]).quantile(torch.tensor([tail, 1 - tail])).tolist()
    value = spearman(one, outputs).mean() - spearman(other, outputs).mean()
    return Difference(value.item(), lower, upper)
