"""From train features and solved targets to scores: the whole matrix, or only its extremes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_trak.influence.gauss_newton import factor, quadratic_form  # noqa: F401 - for the doctest
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
        standard_error: the standard error of the mean over checkpoints, (n, m): a tensor, or what is sliced like one.
        sample: scores at each checkpoint, (checkpoints, r, m), of r training examples, evenly spaced by row.
    """

    standard_error: Any
    sample: Tensor


class Scores(NamedTuple):
    """Scores averaged over checkpoints, (n, m), and how they vary; ``spread`` is None where that was not asked for."""

    mean: Tensor
    spread: Spread | None


@dataclass(frozen=True)
class Extremes:
    """The highest and the lowest scores of every target."""

    top: Ranked
    bottom: Ranked


def scores(
    trains: Sequence[TrainFeatures],
    solved: Sequence[Any],
    advance: Callable[[], object] = lambda: None,
    device: torch.device = CPU,
    *,
    spread: bool = True,
    rows: range | None = None,
) -> Scores:
    """Average φ(z)ᵀ H⁻¹ φ(zᵢ) qᵢ over checkpoints, each with its own q.

    Args:
        trains: the train set's features at each checkpoint.
        solved: H⁻¹ φ(z) at each checkpoint, (m, k), on any device.
        advance: called after every block of rows, for progress.
        device: where blocks are multiplied.
        spread: whether to return how scores vary, which needs another (n, m) numbers.
        rows: of a range of training examples; None for all.

    Returns:
        τ, (n, m), float32, on the CPU; and how it varies from checkpoint to checkpoint, if there are two or more.
    """
    rows = range(trains[0].shape[0]) if rows is None else rows
    r, m, checkpoints, sampled = len(rows), len(solved[0]), len(trains), rows_of_sample(trains[0].shape[0], rows)
    mean, known = torch.zeros(r, m), None
    if spread and checkpoints > 1:
        known = Spread(torch.zeros(r, m), torch.zeros(checkpoints, len(sampled), m))
    for block in trains[0].slices(m, rows):
        here = slice(block.start - rows.start, block.stop - rows.start)
        at_each = score_blocks(trains, solved, block, device)
        if known is None:
            mean[here] = mean_of(at_each)
        else:
            at_each = _noting(at_each, sampled, block, known.sample)
            mean[here], known.standard_error[here] = mean_and_standard_error(at_each, checkpoints)
        advance()
    return Scores(mean, known)


def rows_of_sample(n: int, rows: range) -> Tensor:
    """Return which training examples of a range are in the ``sample`` of a `Spread`.

    >>> rows_of_sample(n=1000, rows=range(100, 150))
    tensor([111, 127, 143])
    """
    sampled = evenly_spaced(n, _SAMPLED)
    return sampled[(sampled >= rows.start) & (sampled < rows.stop)]


def mean_and_standard_error(blocks: Iterable[Tensor], checkpoints: int) -> tuple[Tensor, Tensor]:
    """Return the mean over checkpoints, and its standard error; bit for bit the same mean as `mean_of`.

    >>> mean_and_standard_error([torch.tensor([1.0]), torch.tensor([3.0])], 2)
    (tensor([2.]), tensor([1.]))
    """
    total: Any = 0.0
    squares: Any = 0.0
    for number, block in enumerate(blocks, 1):
        difference = block - total
        total = total + difference / number  # Welford's recurrence, which avoids differences of large sums
        squares = squares + difference * (block - total)
    return total, (squares / (checkpoints * (checkpoints - 1))).sqrt()


def _noting(blocks: Iterable[Tensor], sampled: Tensor, rows: slice, sample: Tensor) -> Iterator[Tensor]:
    """Note the scores of the sampled rows at each checkpoint."""
    here = (sampled >= rows.start) & (sampled < rows.stop)
    for number, block in enumerate(blocks):
        sample[number, here] = block[(sampled[here] - rows.start).to(block.device)].cpu()
        yield block


def extreme_scores(
    trains: Sequence[TrainFeatures],
    solved: Sequence[Tensor],
    k: int,
    advance: Callable[[], object] = lambda: None,
    device: torch.device = CPU,
    rows: range | None = None,
) -> Extremes:
    """Return the k highest and k lowest scores of every target. The (n, m) matrix is never formed.

    See `scores` for the arguments.
    """

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for own in trains[0].slices(len(solved[0]), rows):
            yield own, mean_of(score_blocks(trains, solved, own, device))
            advance()

    return extremes_of(blocks(), k)


def extremes_of(blocks: Iterable[tuple[slice, Tensor]], k: int) -> Extremes:
    """Return the k highest and k lowest scores of every target, from (rows, scores (r, m)) in order.

    >>> extremes_of([(slice(0, 2), torch.tensor([[1.0], [5.0]])), (slice(2, 3), torch.tensor([[7.0]]))], 1).top
    Ranked(indices=tensor([[2]]), values=tensor([[7.]]))
    """
    found: Extremes | None = None
    for rows, values in blocks:
        sides = [rank(values.T, min(k, len(values)), largest) for largest in (True, False)]
        block = Extremes(*(Ranked(side.indices + rows.start, side.values) for side in sides))
        found = block if found is None else merged_extremes([found, block], k)
    assert found is not None  # a train set has examples
    return Extremes(*(Ranked(side.indices.cpu(), side.values.cpu()) for side in (found.top, found.bottom)))


def merged_extremes(parts: Sequence[Extremes], k: int) -> Extremes:
    """Return the k highest and k lowest scores of every target, from those of parts of the train set."""
    sides = []
    for largest in (True, False):
        ranked = [part.top if largest else part.bottom for part in parts]
        values = torch.cat([one.values for one in ranked], 1)
        sides.append(rank(values, min(k, values.shape[1]), largest, torch.cat([one.indices for one in ranked], 1)))
    return Extremes(*sides)


def self_influence(train: TrainFeatures, lower: Tensor, device: torch.device = CPU) -> Tensor:
    """Return by how much training on each example lowers its own loss, at one checkpoint: qᵢ² φ(zᵢ)ᵀ H⁻¹ φ(zᵢ) ≥ 0.

    Since ∇L = −q ∇f, this is ∇Lᵀ H⁻¹ ∇L: the influence of an example on its own loss (Koh and Liang, "Understanding
    black-box predictions via influence functions", ICML 2017, arXiv 1703.04730, Eq. 2). It does not depend on the sign
    of the model output. No (n, n) matrix is formed.

    Args:
        train: the train set's features.
        lower: the Cholesky factor of the damped H, see `factor`.
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
        result[rows] = (quadratic_form(lower, features) * loss_grad.square()).cpu()
    return result


def with_mean_loss_grad(trains: Sequence[TrainFeatures]) -> list[TrainFeatures]:
    """Replace Q at every checkpoint by its average over checkpoints, as in the TRAK paper (Eq. 17)."""
    mean = np.stack([train.loss_grad for train in trains]).mean(0)
    return [replace(train, loss_grad=mean) for train in trains]


def score_blocks(
    trains: Sequence[TrainFeatures], solved: Sequence[Any], rows: slice, device: torch.device
) -> Iterator[Tensor]:
    """Yield the scores of some rows, (r, m), at each checkpoint."""
    for train, vectors in zip(trains, solved, strict=True):
        features, loss_grad, _ = train.block(rows)
        yield score_products(features, loss_grad, vectors, device)


def score_products(features: Matrix, loss_grad: Tensor, solved: Any, device: torch.device) -> Tensor:
    """Return the scores of a block of rows at one checkpoint, (r, m)."""
    with full_precision():
        features, solved = features.to(device), solved.to(device)
        products: Tensor = solved.products(features) if isinstance(solved, Corrected) else features @ solved.T
        return products.mul_(loss_grad.to(device)[:, None])


def mean_of(blocks: Iterable[Tensor]) -> Tensor:
    """Return the mean over checkpoints; the blocks are used up."""
    blocks = iter(blocks)
    total = next(blocks)
    for number, block in enumerate(blocks, 2):
        total += block.sub_(total).div_(number)
    return total


def rank(values: Tensor, k: int, largest: bool, indices: Tensor | None = None) -> Ranked:
    """Return the k largest or smallest values of every row of ``values``, (m, n), the most extreme first."""
    best, where = values.topk(k, dim=1, largest=largest)
    return Ranked(where if indices is None else indices.gather(1, where), best)
