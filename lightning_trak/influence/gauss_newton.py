"""The Gauss–Newton matrix H of the training loss in feature space: accumulated, damped, factored; never inverted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.influence.train_features import CPU, TrainFeatures
from lightning_trak.precision import full_precision

SUMS_VERSION = 1  # count it up when the same features come to other sums, or to another damping of cross-validation
_PANEL = 512


@dataclass
class GaussNewton:
    """H and other sums over the train set at one checkpoint: all that the estimator needs apart from Φ.

    Attributes:
        matrix: H = Φᵀ diag(w) Φ, or Φᵀ Φ, (k, k), float64; undamped. `factor` overwrites it.
        gradient: Φᵀq, (k,), float64.
        squares: Σ q² ‖φ‖².
        curvature_scale: the mean diagonal of Φᵀ diag(w) Φ, whether or not H is weighted.
        n_train: n.
        cross_validated: λ by cross-validation; None where it was not computed.
    """

    matrix: Tensor
    gradient: Tensor
    squares: float
    curvature_scale: float
    n_train: int
    cross_validated: float | None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the sums as arrays, to be stored; of the symmetric H only the upper half."""
        rows, columns = np.triu_indices(len(self.matrix))
        return {
            "upper": self.matrix.cpu().numpy()[rows, columns],
            "gradient": self.gradient.cpu().numpy(),
            "numbers": np.array([self.squares, self.curvature_scale, self.n_train, self.cross_validated or np.nan]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], device: torch.device = CPU) -> GaussNewton:
        """Return the sums from what `arrays` returned."""
        k = len(arrays["gradient"])
        matrix, upper, start = np.empty((k, k)), arrays["upper"], 0
        for row in range(k):  # by slices: arrays of all indices would be larger than the matrix
            matrix[row, row:] = matrix[row:, row] = upper[start : start + k - row]
            start += k - row
        squares, curvature_scale, n_train, damping = arrays["numbers"].tolist()
        own, gradient = (torch.from_numpy(array).to(device) for array in (matrix, arrays["gradient"]))
        return cls(own, gradient, squares, curvature_scale, int(n_train), None if np.isnan(damping) else damping)

    @property
    def scale(self) -> float:
        """The mean diagonal of H, to which damping is relative."""
        return self.matrix.diagonal().mean().item()


def accumulate(
    train: TrainFeatures, *, curvature: bool, sample_size: int = 0, device: torch.device = CPU, panel: int = _PANEL
) -> tuple[GaussNewton, tuple[Tensor, ...]]:
    """Accumulate H over the train set, which is read once.

    Blocks of rows are multiplied in float32, and summed in float64. H is symmetric, so only panels on and above its
    diagonal are computed.

    Args:
        train: the train set at one checkpoint.
        curvature: whether to weight by w.
        sample_size: how many rows to return, drawn at random, always the same ones.
        device: where to multiply.
        panel: columns of H per product.

    Returns:
        The sums; and Φ, Q and w of the drawn rows.

    Raises:
        ValueError: if a weight is negative, so that H may not be positive definite.

    >>> import numpy as np
    >>> train = TrainFeatures(np.array([[1, 0], [1, 1]], "f4"), np.ones(2, "f4"), np.array([2, 1], "f4"))
    >>> accumulate(train, curvature=True)[0].matrix
    tensor([[3., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    n, k = train.shape
    matrix = torch.zeros(k, k, dtype=torch.float64, device=device)
    gradient = torch.zeros(k, dtype=torch.float64, device=device)
    squares, weighted = 0.0, 0.0
    chosen = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(n)[:sample_size]))
    sampled = []
    for rows, features, loss_grad, w in train.blocks(device=device):
        if curvature:
            _check_not_negative(w)
        _add_products_(matrix, features, w if curvature else None, panel)
        norms = features.square().sum(1)
        with full_precision():
            weighted += (norms @ w).item()
            squares += (norms @ loss_grad.square()).item()
            gradient += loss_grad @ features
        here = (chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start).to(device)
        sampled.append([array[here] for array in (features, loss_grad, w)])
    for first in range(0, k, panel):
        last = first + panel
        own = matrix[first:last, first:last]
        own.copy_(own.triu() + own.triu(1).T)  # a panel times itself is symmetric, up to rounding
        matrix[last:, first:last] = matrix[first:last, last:].T
    sample = tuple(torch.cat(parts) for parts in zip(*sampled, strict=True))
    return GaussNewton(matrix, gradient, squares, weighted / k, n), sample


def _add_products_(matrix: Tensor, features: Tensor, weights: Tensor | None, panel: int) -> None:
    """Add Φᵀ diag(w) Φ of a block of rows, on and above the diagonal."""
    weighted = features if weights is None else features * weights[:, None]
    with full_precision():
        for first in range(0, len(matrix), panel):
            last = first + panel
            matrix[first:last, first:] += weighted[:, first:last].T @ features[:, first:]


def _check_not_negative(weights: Tensor) -> None:
    negative = weights < 0
    if bool(negative.any()):
        raise ValueError(
            f"The curvature ∂²L/∂f² is negative for {int(negative.sum())} examples (least:"
            f" {weights.min().item():.3g}): output_to_loss is not convex in the output. Use"
            " TRAKCallback(curvature=False), or override out_to_loss_curvature."
        )


def factor(matrix: Tensor, damping: float) -> Tensor:
    """Damp H relative to its mean diagonal and factor it: H + λ·mean(diag H)·I = L Lᵀ. Return L, (k, k), float64.

    The damping is relative: the same λ suits any scale of the gradients and any size of the train set.

    Args:
        matrix: H, (k, k), symmetric, positive semi-definite. It is overwritten, since a copy would be large.
        damping: λ ≥ 0.

    Raises:
        ValueError: if the damped matrix is not numerically positive definite.

    >>> lower = factor(2 * torch.eye(2, dtype=torch.float64), damping=0.5)
    >>> solve(lower, torch.tensor([[3.0, 6.0]]))
    tensor([[1., 2.]])
    """
    scale = matrix.diagonal().mean()
    if not bool(torch.isfinite(scale)) or scale <= 0:
        raise ValueError(
            f"The Gauss–Newton matrix H has a mean diagonal of {scale.item():.3g}: all gradients or all curvatures"
            " vanish or are not finite. Attribute checkpoints whose training loss is not exactly zero, or use"
            " curvature=False."
        )
    matrix.diagonal().add_(damping * scale)
    diagonal, rank = matrix.diagonal().clone(), effective_rank(matrix)
    columns = matrix.mT  # the same matrix, in the column order of LAPACK
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    lower, info = torch.linalg.cholesky_ex(columns, out=(columns, info))
    pivots = lower.diagonal().square()
    # Features are float32, so H is exact to about k·ε of its largest entry: smaller pivots mean that it is singular.
    if int(info) or bool(pivots.min() < 1e-7 * pivots.max()):
        least = 0.0 if int(info) else pivots.min()  # an upper bound of the least eigenvalue
        condition = diagonal.max() / least
        raise ValueError(
            f"The Gauss–Newton matrix H, ({len(matrix)}, {len(matrix)}), is singular or nearly so with"
            f" damping={damping:g} (condition number ≥ {condition.item():.2g}, effective rank {rank:.1f}): there are"
            " too few or too similar training examples for so many features. Set TRAKCallback(damping='auto'), or a"
            " proj_dim well below the number of training examples."
        )
    return lower


def effective_rank(matrix: Tensor) -> float:
    """Return (tr H)² / ‖H‖², the number of equal eigenvalues with the same sum and sum of squares as H's.

    >>> round(effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0]))), 4)
    2.0
    """
    return ((matrix.diagonal().sum() / torch.linalg.matrix_norm(matrix)) ** 2).item()


def solve(lower: Tensor, vectors: Tensor) -> Tensor:
    """Return (H + λ·mean(diag H)·I)⁻¹ x for every row x of ``vectors``, (m, k) → (m, k), in their own precision."""
    half = torch.linalg.solve_triangular(lower, vectors.to(lower.dtype).T, upper=False)
    solved = torch.linalg.solve_triangular(lower.mT, half, upper=True).T  # cholesky_solve would copy the factor
    return solved.to(vectors.dtype).contiguous()


def quadratic_form(lower: Tensor, vectors: Tensor) -> Tensor:
    """Return xᵀ (H + λ·mean(diag H)·I)⁻¹ x for every row x of ``vectors``, (m, k) → (m,): ‖L⁻¹x‖², so one solve does.

    >>> quadratic_form(factor(2 * torch.eye(2, dtype=torch.float64), damping=0.5), torch.tensor([[3.0, 6.0]]))
    tensor([15.])
    """
    return whitened(lower, vectors).square().sum(1)


def whitened(lower: Tensor, vectors: Tensor) -> Tensor:
    """Return L⁻¹ x for every row x of ``vectors``, (m, k) → (m, k), where L Lᵀ = H + λ·mean(diag H)·I.

    >>> whitened(factor(3 * torch.eye(2, dtype=torch.float64), damping=1 / 3), torch.tensor([[4.0, 6.0]]))
    tensor([[2., 3.]])
    """
    half = torch.linalg.solve_triangular(lower, vectors.to(lower.dtype).T, upper=False)
    return half.T.to(vectors.dtype)
