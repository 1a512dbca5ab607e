"""The helpful and the harmful training examples of each target: those with positive, and with negative scores."""

from __future__ import annotations

import torch

from lightning_trak.influence import Ranked


def of_sign(ranked: Ranked, sign: int) -> list[list[tuple[int, float]]]:
    """Return the training examples of each target whose scores have a sign, with their scores, in their order.

    >>> of_sign(Ranked(torch.tensor([[2, 0, 1]]), torch.tensor([[0.5, 0.0, -1.0]])), 1)
    [[(2, 0.5)]]
    """
    pairs = (zip(*row, strict=True) for row in zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True))
    return [[(row, value) for row, value in one if value * sign > 0] for one in pairs]


def check_finite(*sides: Ranked) -> None:
    """Raise a ValueError if a score is not finite."""
    if not all(bool(torch.isfinite(ranked.values).all()) for ranked in sides):
        raise ValueError(
            "Some scores are not finite, so they cannot be ranked. Compute them again, with more damping:"
            " TRAKCallback(damping=...)."
        )
