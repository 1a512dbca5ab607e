"""From the features of all checkpoints to scores: the whole matrix, or only its extremes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.gram import CholeskyFactor, effective_rank, factor, full_precision, gram, quadratic_form, solve

_BLOCK_ROWS = 4096
_BLOCK_SCORES = 2**26  # at most so many at once: 256 MiB
_SAMPLED = 64  # training examples whose scores are kept for every checkpoint
_CPU = torch.device("cpu")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TrainFeatures:
    """What the scores need of the train set at one checkpoint; arrays may be memory-mapped.

    Attributes:
        features: Φ, (n, k).
        loss_grad: Q, (n,).
        curvature: w, (n,).

    All three must be writable, or mapped copy-on-write (``mmap_mode="c"``), for torch to read them in place.
    """

    features: Array
    loss_grad: Array
    curvature: Array

    def block(self, rows: slice, device: torch.device = _CPU) -> tuple[Tensor, Tensor, Tensor]:
        """Return Φ, Q and w of some rows; on the CPU they are views."""
        arrays = (self.features[rows], self.loss_grad[rows], self.curvature[rows])
        features, loss_grad, curvature = (torch.from_numpy(np.asarray(array)).to(device) for array in arrays)
        return features, loss_grad, curvature

    def sample(self, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return Φ, Q and w of at most ``size`` rows, drawn at random, but the same every time."""
        rows = np.sort(np.random.default_rng(0).permutation(len(self.features))[:size])
        features, loss_grad, curvature = (
            torch.from_numpy(array[rows]).to(device) for array in (self.features, self.loss_grad, self.curvature)
        )
        return features, loss_grad, curvature


class Ranked(NamedTuple):
    """Training examples in the order of their scores, for every target.

    Attributes:
        indices: (m, k), rows of the train set.
        values: (m, k), their scores.
    """

    indices: Tensor
    values: Tensor


@dataclass(frozen=True)
class Spread:
    """How scores vary from checkpoint to checkpoint.

    Attributes:
        standard_error: of the mean over checkpoints, (n, m).
        sample: the scores of some training examples, evenly spaced, at each checkpoint, (checkpoints, r, m).
    """

    standard_error: Tensor
    sample: Tensor


class Scores(NamedTuple):
    """Scores averaged over checkpoints, (n, m), and how they vary; None for a single checkpoint."""

    mean: Tensor
    spread: Spread | None


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
    return solve(_factor(train, damping, curvature, targets.device), targets)


def self_influence(train: TrainFeatures, *, damping: float, curvature: bool, device: torch.device = _CPU) -> Tensor:
    """Return how much training on each example lowers its own loss, at one checkpoint: qᵢ² φ(zᵢ)ᵀ H⁻¹ φ(zᵢ) ≥ 0.

    As ∇L = −q ∇f, this is ∇Lᵀ H⁻¹ ∇L, the influence of Koh and Liang, "Understanding black-box predictions via
    influence functions", ICML 2017, arXiv 1703.04730, Eq. 2, of an example on its own loss. It does not depend on the
    sign of the model output. See `precondition` and `scores` for the arguments. No n × n matrix is made.

    Returns:
        q times the diagonal of the scores with the train set as targets, (n,), float32, on the CPU.

    >>> import numpy as np
    >>> train = TrainFeatures(np.eye(3, 2, dtype="f4"), np.array([1, -2, 1], "f4"), np.ones(3, "f4"))
    >>> self_influence(train, damping=0, curvature=True)
    tensor([1., 4., 0.])
    """
    state, result = _factor(train, damping, curvature, device), torch.zeros(len(train.features))
    for rows in _blocks(len(result)):
        features, loss_grad, _ = train.block(rows, device)
        result[rows] = (quadratic_form(state, features) * loss_grad.square()).cpu()
    return result


def with_mean_loss_grad(trains: Sequence[TrainFeatures]) -> list[TrainFeatures]:
    """Give every checkpoint the Q averaged over all of them, apart from H⁻¹, as the TRAK paper does (Eq. 17)."""
    mean = np.stack([train.loss_grad for train in trains]).mean(0)
    return [replace(train, loss_grad=mean) for train in trains]


def _factor(train: TrainFeatures, damping: float, curvature: bool, device: torch.device) -> CholeskyFactor:
    """Accumulate the kernel of one checkpoint, damp and factor it."""
    n, k = train.features.shape
    blocks = (train.block(rows, device) for rows in _blocks(n))
    kernel = gram((features, w if curvature else None) for features, _, w in blocks)
    if damping == 0 and n <= k:
        rank = effective_rank(kernel)
        raise ValueError(
            f"With damping=0 the kernel H, ({k}, {k}), of n={n} training examples is singular (condition number inf,"
            f" effective rank {rank:.1f}), and scores would be meaningless. Set TRAKCallback(damping='auto'), or a"
            " proj_dim well below n."
        )
    return factor(kernel, damping)


class Moments(NamedTuple):
    """Sums over the train set at one checkpoint, from which damping follows.

    Attributes:
        scale: the mean diagonal of H, to which damping is relative.
        weighted_scale: that of Φᵀ diag(w) Φ, whether or not H is weighted.
        gradient: Φᵀq, (k,).
        squares: Σ q² ‖φ‖².
    """

    scale: float
    weighted_scale: float
    gradient: Tensor
    squares: float


def moments(train: TrainFeatures, *, curvature: bool, device: torch.device = _CPU) -> Moments:
    """Add up what damping depends on, without H; see `precondition` for the arguments.

    >>> import numpy as np
    >>> train = TrainFeatures(np.eye(3, 2, dtype="f4"), np.ones(3, "f4"), np.full(3, 0.5, "f4"))
    >>> moments(train, curvature=False)
    Moments(scale=1.0, weighted_scale=0.5, gradient=tensor([1., 1.], dtype=torch.float64), squares=2.0)
    """
    n, k = train.features.shape
    gradient = torch.zeros(k, dtype=torch.float64, device=device)
    plain = weighted = squares = 0.0
    for rows in _blocks(n):
        features, loss_grad, w = train.block(rows, device)
        norms = features.square().sum(1)
        with full_precision():
            plain, weighted = plain + norms.sum().item(), weighted + (norms @ w).item()
            squares += (norms @ loss_grad.square()).item()
            gradient += loss_grad @ features
    return Moments((weighted if curvature else plain) / k, weighted / k, gradient, squares)


def scores(
    trains: Sequence[TrainFeatures],
    solved: Sequence[Tensor],
    advance: Callable[[], object] = lambda: None,
    device: torch.device = _CPU,
) -> Scores:
    """Average φ(z)ᵀ H⁻¹ φ(zᵢ) qᵢ over checkpoints, each with its own q.

    Args:
        trains: the train set's features at each checkpoint.
        solved: H⁻¹ φ(z) at each checkpoint, (m, k), from `precondition`, on any device.
        advance: called after every block of rows, for progress.
        device: where blocks are multiplied.

    Returns:
        τ, (n, m), float32, on the CPU; and how it varies from checkpoint to checkpoint, unless there is one only.
    """
    n, m, checkpoints = len(trains[0].features), len(solved[0]), len(trains)
    mean = torch.zeros(n, m)
    if checkpoints == 1:
        for rows in _blocks(n, m):
            mean[rows] = _score_block(trains, solved, rows, device)
            advance()
        return Scores(mean, None)
    sampled = torch.linspace(0, n - 1, min(n, _SAMPLED)).round().long()
    spread = Spread(torch.zeros(n, m), torch.zeros(checkpoints, len(sampled), m))
    for rows in _blocks(n, m):
        here = (sampled >= rows.start) & (sampled < rows.stop)
        total = squares = torch.zeros(rows.stop - rows.start, m, device=device)
        for number, block in enumerate(_blocks_of_checkpoints(trains, solved, rows, device)):
            difference = block - total
            total = total + difference / (number + 1)  # Welford's recurrence: no difference of large sums of squares
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
    device: torch.device = _CPU,
) -> Extremes:
    """Return the k highest and k lowest scores of every target, without ever holding the (n, m) matrix.

    See `scores` for the arguments.
    """
    n, m = len(trains[0].features), len(solved[0])
    top = bottom = Ranked(torch.zeros(m, 0, dtype=torch.int64, device=device), torch.zeros(m, 0, device=device))
    for rows in _blocks(n, m):
        values = _score_block(trains, solved, rows, device).T
        top, bottom = (_keep(kept, rows.start, values, k, largest) for kept, largest in ((top, True), (bottom, False)))
        advance()
    return Extremes(*(Ranked(kept.indices.cpu(), kept.values.cpu()) for kept in (top, bottom)))


def n_blocks(n_train: int, n_targets: int) -> int:
    """Return how many blocks of rows the scores come in."""
    return len(list(_blocks(n_train, n_targets)))


def _blocks(n_train: int, n_targets: int = 1) -> Iterator[slice]:
    """Cut the rows of the train set so that neither the features nor the scores of a block are large."""
    size = min(_BLOCK_ROWS, max(1, _BLOCK_SCORES // n_targets))
    for start in range(0, n_train, size):
        yield slice(start, min(start + size, n_train))


def _score_block(
    trains: Sequence[TrainFeatures], solved: Sequence[Tensor], rows: slice, device: torch.device
) -> Tensor:
    """Return scores averaged over checkpoints, (r, m)."""
    total = torch.zeros(rows.stop - rows.start, len(solved[0]), device=device)
    for number, block in enumerate(_blocks_of_checkpoints(trains, solved, rows, device)):
        total += (block - total) / (number + 1)  # as in `scores`, to the bit
    return total


def _blocks_of_checkpoints(
    trains: Sequence[TrainFeatures], solved: Sequence[Tensor], rows: slice, device: torch.device
) -> Iterator[Tensor]:
    """Yield the scores of some rows at each checkpoint, (r, m)."""
    for train, x in zip(trains, solved, strict=True):
        features, loss_grad, _ = train.block(rows, device)
        with full_precision():
            block = (features * loss_grad[:, None]) @ x.to(device).T
        yield block


def _keep(kept: Ranked, first: int, values: Tensor, k: int, largest: bool) -> Ranked:
    """Merge the best so far, (m, k), with those of a block whose rows begin at ``first``."""
    block = rank(values, min(k, values.shape[1]), largest)
    indices = torch.cat([kept.indices, block.indices + first], 1)
    values = torch.cat([kept.values, block.values], 1)
    return rank(values, min(k, values.shape[1]), largest, indices)


def rank(values: Tensor, k: int, largest: bool, indices: Tensor | None = None) -> Ranked:
    """Return the k largest or smallest of every row of ``values``, (m, n), the best first."""
    best, where = values.topk(k, dim=1, largest=largest)
    return Ranked(where if indices is None else indices.gather(1, where), best)
