"""What is wrong with which training examples: mislabelled, near-duplicate, leak, harmful; and the limits for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.influence.outliers import outliers

SAME, CLOSER = 0.97, 0.2  # the cosine from which examples are near-duplicates, and how much closer than usual they are
IDENTICAL = 0.999  # such a cosine is enough: in a set of nothing but duplicates, all are close
MISLABELLED = 4.0  # standard deviations above the median, of the root of the loss
HARMFUL = 6.0  # the same, of the harm: its distribution has heavier tails


@dataclass(frozen=True)
class Findings:
    """What is known of n training examples, and what is wrong with them.

    Attributes:
        loss: the training loss: half of the last checkpoint's, and half of the average over checkpoints, (n,).
        self_influence: by how much training on an example lowers its own loss, (n,).
        mislabelled: which are probably mislabelled, (n,), bool.
        duplicate_of: the row of an earlier training example that is nearly the same, (n,); −1 for none.
        similarity: the cosine with the nearest earlier training example, (n,); −1 if there is none.
        leaks: the number of a target that is nearly the same, (n,); −1 for none.
        leak_similarity: the cosine with the nearest target, (n,); −1 if there is none.
        harmful: which are harmful on average over the targets, (n,), bool.
        harm: how much training on an example worsened the outputs of the targets on average, (n,); None without
            targets.
    """

    loss: Tensor
    self_influence: Tensor
    mislabelled: Tensor
    duplicate_of: Tensor
    similarity: Tensor
    leaks: Tensor
    leak_similarity: Tensor
    harmful: Tensor
    harm: Tensor | None = None

    @property
    def wrong(self) -> Tensor:
        """Which examples have anything wrong, (n,), bool."""
        return self.mislabelled | (self.duplicate_of >= 0) | (self.leaks >= 0) | self.harmful

    def order(self) -> Tensor:
        """Return all rows: first those with something wrong, each part by its loss, the highest first."""
        by_loss = self.loss.argsort(descending=True, stable=True)
        return by_loss[self.wrong[by_loss].logical_not().long().argsort(stable=True)]


def findings(
    loss: Tensor,
    self_influence: Tensor,
    neighbours: tuple[Tensor, Tensor],
    near_targets: tuple[Tensor, Tensor] | None = None,
    harm: Tensor | None = None,
) -> Findings:
    """Decide what is wrong with each training example.

    - Mislabelled: √loss is an outlier, see `outliers`. Squared errors thus count as distances from the label.
    - Near-duplicate: the cosine c with an earlier example is at least 0.999; or at least 0.97, and 1 − c at most a
      fifth of its median over examples. So classes whose examples are all alike do not count. Removing all
      near-duplicates leaves one of each.
    - Leak: the same with the nearest target.
    - Harmful: the harm is positive, and an outlier.

    Args:
        loss: as in `Findings`, (n,), not negative.
        self_influence: (n,).
        neighbours: row and cosine of the nearest earlier training example, (n,) each; see `nearest`.
        near_targets: number and cosine of the nearest target, (n,) each; None without targets.
        harm: (n,); None without targets.

    >>> nearest = torch.tensor([-1, 0, 0]), torch.tensor([-1.0, 0.5, 0.99])
    >>> found = findings(torch.tensor([0.1, 0.3, 0.2]), torch.ones(3), nearest)
    >>> found.duplicate_of.tolist(), found.order().tolist()
    ([-1, -1, 0], [2, 1, 0])
    """
    none = torch.full(loss.shape, -1), torch.full(loss.shape, -1.0)
    (rows, similarity), (targets, leak_similarity) = neighbours, near_targets or none
    return Findings(
        loss=loss,
        self_influence=self_influence,
        mislabelled=outliers(loss.clamp(min=0).sqrt(), MISLABELLED),
        duplicate_of=rows.where(similarity >= _limit(similarity[1:]), -1),
        similarity=similarity,
        leaks=targets.where(leak_similarity >= _limit(leak_similarity), -1),
        leak_similarity=leak_similarity,
        harmful=torch.zeros(loss.shape, dtype=torch.bool) if harm is None else (harm > 0) & outliers(harm, HARMFUL),
        harm=harm,
    )


def _limit(similarity: Tensor) -> float:
    """Return the cosine from which examples are near-duplicates, from those with the nearest, (n,)."""
    if not len(similarity):
        return IDENTICAL
    return min(IDENTICAL, max(SAME, 1 - CLOSER * (1 - similarity.median().item())))
