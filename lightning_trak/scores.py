"""From the features of all checkpoints to scores: the whole matrix, or only its extremes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.gram import factor, gram, solve

_BLOCK_ROWS = 4096

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TrainFeatures:
    """What the scores need of the train set at one checkpoint; arrays may be memory-mapped.

    Attributes:
        features: Φ, (n, k).
        loss_grad: Q, (n,).
        curvature: w, (n,).
    """

    features: Array
    loss_grad: Array
    curvature: Array

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield (rows, Φ, Q, w) for consecutive blocks of rows."""
        for start in range(0, len(self.features), _BLOCK_ROWS):
            rows = slice(start, min(start + _BLOCK_ROWS, len(self.features)))
            arrays = (self.features[rows], self.loss_grad[rows], self.curvature[rows])
            features, loss_grad, curvature = (torch.from_numpy(np.array(array)) for array in arrays)
            yield rows, features, loss_grad, curvature


class Ranked(NamedTuple):
    """Training examples in the order of their scores, for every target.

    Attributes:
        indices: (m, k), rows of the train set.
        values: (m, k), their scores.
    """

    indices: Tensor
    values: Tensor


@dataclass(frozen=True)
class Extremes:
    """The highest and the lowest scores of every target."""

    top: Ranked
    bottom: Ranked


def precondition(train: TrainFeatures, targets: Tensor, *, damping: float, curvature: bool) -> Tensor:
    """Solve H x = φ(z) for every target at one checkpoint.

    H = Φᵀ diag(w) Φ is the Gauss–Newton Hessian of the training loss in feature space, and the score the predicted
    change of f(z) by one Newton step; without curvature H = Φᵀ Φ, the estimator of TRAK (arXiv 2303.14186, Eq. 15)
    and of its reference implementation.

    Args:
        train: the train set's features.
        targets: φ(z), (m, k).
        damping: λ, relative to the mean diagonal of H.
        curvature: whether to weight by w.

    Returns:
        H⁻¹ φ(z), (m, k).
    """
    n, k = train.features.shape
    if damping == 0 and n <= k:
        raise ValueError(
            f"With damping=0 the kernel H, ({k}, {k}), of n={n} training examples is singular, and scores would be"
            " meaningless. Set TRAKCallback(damping=0.3), or a proj_dim well below n."
        )
    kernel = gram((features, w if curvature else None) for _, features, _, w in train.blocks())
    return solve(factor(kernel, damping), targets)


def scores(
    trains: Sequence[TrainFeatures], solved: Sequence[Tensor], advance: Callable[[], object] = lambda: None
) -> Tensor:
    """Average φ(z)ᵀ H⁻¹ φ(zᵢ) qᵢ over checkpoints, each with its own q.

    Args:
        trains: the train set's features at each checkpoint.
        solved: H⁻¹ φ(z) at each checkpoint, (m, k), from `precondition`.
        advance: called after every block of rows, for progress.

    Returns:
        τ, (n, m), float32.
    """
    total = torch.zeros(len(trains[0].features), len(solved[0]))
    for rows, block in _score_blocks(trains, solved):
        total[rows] = block
        advance()
    return total


def extreme_scores(
    trains: Sequence[TrainFeatures], solved: Sequence[Tensor], k: int, advance: Callable[[], object] = lambda: None
) -> Extremes:
    """Return the k highest and k lowest scores of every target, without ever holding the (n, m) matrix.

    See `scores` for the arguments.
    """
    top = bottom = Ranked(torch.zeros(len(solved[0]), 0, dtype=torch.int64), torch.zeros(len(solved[0]), 0))
    for rows, block in _score_blocks(trains, solved):
        indices = torch.arange(rows.start, rows.stop).expand(block.shape[1], -1)
        top, bottom = (_keep(kept, indices, block.T, k, largest) for kept, largest in ((top, True), (bottom, False)))
        advance()
    return Extremes(top, bottom)


def n_blocks(n_train: int) -> int:
    """Return how many blocks of rows the scores come in."""
    return -(-n_train // _BLOCK_ROWS)


def _score_blocks(trains: Sequence[TrainFeatures], solved: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, (r, m) scores averaged over checkpoints)."""
    for blocks in zip(*(train.blocks() for train in trains), strict=True):
        total = sum((features @ x.T) * q[:, None] for (_, features, q, _), x in zip(blocks, solved, strict=True))
        assert isinstance(total, Tensor)
        yield blocks[0][0], total / len(trains)


def _keep(kept: Ranked, indices: Tensor, values: Tensor, k: int, largest: bool) -> Ranked:
    indices, values = torch.cat([kept.indices, indices], 1), torch.cat([kept.values, values], 1)
    return rank(values, min(k, values.shape[1]), largest, indices)


def rank(values: Tensor, k: int, largest: bool, indices: Tensor | None = None) -> Ranked:
    """Return the k largest or smallest of every row of ``values``, (m, n), the best first."""
    best, where = values.topk(k, dim=1, largest=largest)
    return Ranked(where if indices is None else indices.gather(1, where), best)
