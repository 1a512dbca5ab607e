"""From train features and solved targets to scores: the whole matrix, or only its extremes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_trak.influence.gauss_newton import CholeskyFactor, factor, quadratic_form  # noqa: F401 - for the doctest
from lightning_trak.influence.output_curvature import Corrected
from lightning_trak.influence.train_features import CPU, Matrix, TrainFeatures, evenly_spaced
from lightning_trak.precision import full_precision

_SAMPLED = 64  # training examples whose scores at every checkpoint are kept


class Ranked(NamedTuple):
    """Training examples, ranked by their scores for each target.

    Attributes:
        indices: (m, k), row numbers in the train set.
        values: (m, k), their scores.
    """

    indices: Tensor
    values: Tensor


@dataclass(frozen=True)
class Spread:
    """How scores vary from checkpoint to checkpoint.

    Attributes:
        standard_error: the standard error of the mean over checkpoints, (n, m).
        sample: scores at each checkpoint, (checkpoints, r, m), of r training examples, evenly spaced by row.
    """

    standard_error: Tensor
    sample: Tensor


class Scores(NamedTuple):
    """Scores averaged over checkpoints, (n, m), and how they vary; ``spread`` is None for a single checkpoint."""

    mean: Tensor
    spread: Spread | None


@dataclass(frozen=True)
class Extremes:
    """The highest and the lowest scores of every target."""

    top: Ranked
    bottom: Ranked


def scores(
    trains: Sequence[TrainFeatures],
    solved: Sequence[Tensor],
    advance: Callable[[], object] = lambda: None,
    device: torch.device = CPU,
) -> Scores:
    """Average φ(z)ᵀ H⁻¹ φ(zᵢ) qᵢ over checkpoints, each with its own q.

    Args:
        trains: the train set's features at each checkpoint.
        solved: H⁻¹ φ(z) at each checkpoint, (m, k), on any device.
        advance: called after every block of rows, for progress.
        device: where blocks are multiplied.

    Returns:
        τ, (n, m), float32, on the CPU; and how it varies from checkpoint to checkpoint, if there are two or more.
    """
    (n, _), m, checkpoints = trains[0].shape, len(solved[0]), len(trains)
    mean = torch.zeros(n, m)
    if checkpoints == 1:
        for rows, blocks in _score_blocks(trains, solved, device):
            mean[rows] = _mean(blocks)
            advance()
        return Scores(mean, None)
    sampled = evenly_spaced(n, _SAMPLED)
    spread = Spread(torch.zeros(n, m), torch.zeros(checkpoints, len(sampled), m))
    for rows, blocks in _score_blocks(trains, solved, device):
        here = (sampled >= rows.start) & (sampled < rows.stop)
        total = squares = torch.zeros(rows.stop - rows.start, m, device=device)
        for number, block in enumerate(blocks):
            difference = block - total
            total = total + difference / (number + 1)  # Welford's recurrence, which avoids differences of large sums
            squares = squares + difference * (block - total)
            spread.sample[number, here] = block[sampled[here] - rows.start].cpu()
        mean[rows] = total
        spread.standard_error[rows] = (squares / (checkpoints * (checkpoints - 1))).sqrt()
        advance()
    return Scores(mean, spread)


def extreme_scores(
    trains: Sequence[TrainFeatures],
    solved: Sequence[Tensor],
    k: int,
    advance: Callable[[], object] = lambda: None,
    device: torch.device = CPU,
) -> Extremes:
    """Return the k highest and k lowest scores of every target. The (n, m) matrix is never formed.

    See `scores` for the arguments.
    """
    m = len(solved[0])
    top = bottom = Ranked(torch.zeros(m, 0, dtype=torch.int64, device=device), torch.zeros(m, 0, device=device))
    for rows, blocks in _score_blocks(trains, solved, device):
        values = _mean(blocks).T
        top, bottom = (_keep(kept, rows.start, values, k, largest) for kept, largest in ((top, True), (bottom, False)))
        advance()
    return Extremes(*(Ranked(kept.indices.cpu(), kept.values.cpu()) for kept in (top, bottom)))


def self_influence(
    train: TrainFeatures,
    state: CholeskyFactor,
    advance: Callable[[], object] = lambda: None,
    device: torch.device = CPU,
) -> Tensor:
    """Return by how much training on each example lowers its own loss, at one checkpoint: qᵢ² φ(zᵢ)ᵀ H⁻¹ φ(zᵢ) ≥ 0.

    Since ∇L = −q ∇f, this is ∇Lᵀ H⁻¹ ∇L: the influence of an example on its own loss (Koh and Liang, "Understanding
    black-box predictions via influence functions", ICML 2017, arXiv 1703.04730, Eq. 2). It does not depend on the sign
    of the model output. No (n, n) matrix is formed.

    Args:
        train: the train set's features.
        state: the Cholesky factor of the damped H.
        advance: called after every block of rows, for progress.
        device: where blocks are multiplied.

    Returns:
        The self-influence, (n,), float32, on the CPU. With the scores of the train set as targets, it is q times their
        diagonal.

    >>> train = TrainFeatures(np.eye(3, 2, dtype="f4"), np.array([1, -2, 1], "f4"), np.ones(3, "f4"))
    >>> self_influence(train, factor(torch.eye(2, dtype=torch.float64), damping=0))
    tensor([1., 4., 0.])
    """
    result = torch.zeros(train.shape[0])
    for rows, features, loss_grad, _ in train.blocks(device=device):
        result[rows] = (quadratic_form(state, features) * loss_grad.square()).cpu()
        advance()
    return result


def with_mean_loss_grad(trains: Sequence[TrainFeatures]) -> list[TrainFeatures]:
    """Replace Q at every checkpoint by its average over checkpoints, as in the TRAK paper (Eq. 17)."""
    mean = np.stack([train.loss_grad for train in trains]).mean(0)
    return [replace(train, loss_grad=mean) for train in trains]


def _score_blocks(
    trains: Sequence[TrainFeatures], solved: Sequence[Tensor], device: torch.device
) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """Yield blocks of rows, and their scores (r, m) at each checkpoint."""
    readers = [train.blocks(len(solved[0])) for train in trains]
    for parts in zip(*readers, strict=True):
        yield parts[0][0], (score_products(part[1], part[2], x, device) for part, x in zip(parts, solved, strict=True))


def score_products(features: Matrix, loss_grad: Tensor, solved: Any, device: torch.device) -> Tensor:
    """Return the scores of a block of rows at one checkpoint, (r, m)."""
    with full_precision():
        features, solved = features.to(device), solved.to(device)
        products: Tensor = solved.products(features) if isinstance(solved, Corrected) else features @ solved.T
        return products * loss_grad.to(device)[:, None]


def _mean(blocks: Iterator[Tensor]) -> Tensor:
    """Average over checkpoints; bit for bit as `scores` does."""
    total = next(blocks)
    for number, block in enumerate(blocks, 2):
        total = total + (block - total) / number
    return total


def _keep(kept: Ranked, first: int, values: Tensor, k: int, largest: bool) -> Ranked:
    """Merge the extremes so far, (m, k), with those of a block whose rows start at ``first``."""
    block = rank(values, min(k, values.shape[1]), largest)
    indices = torch.cat([kept.indices, block.indices + first], 1)
    values = torch.cat([kept.values, block.values], 1)
    return rank(values, min(k, values.shape[1]), largest, indices)


def rank(values: Tensor, k: int, largest: bool, indices: Tensor | None = None) -> Ranked:
    """Return the k largest or smallest values of every row of ``values``, (m, n), the most extreme first."""
    best, where = values.topk(k, dim=1, largest=largest)
    return Ranked(where if indices is None else indices.gather(1, where), best)
