"""The kernel H: accumulated, damped, factored once, solved many times; never inverted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PANEL = 512  # columns of H that are multiplied at once


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply in float32 whatever the user asked for in training: a kernel of 10 bits cannot be solved with.

    Afterwards the settings are theirs again. Those of `torch.set_float32_matmul_precision` are not even read where
    there are others: torch refuses that where a program used both.
    """
    settings = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn) if _has_own(backend)]
    if not settings:  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(_exact(setting))
        yield


def _has_own(backend: Any) -> bool:
    """Whether a backend has a precision of its own for products."""
    try:
        return isinstance(backend.matmul.fp32_precision, str)
    except AttributeError:
        return False


@contextmanager
def _exact(setting: Any) -> Iterator[None]:
    """Set one precision to that of IEEE, and back: to what it was, or to following a more general one if it did."""
    before = setting.fp32_precision
    setting.fp32_precision = "none"
    inherited = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = "none" if before == inherited else before


def gram(blocks: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Accumulate H = Φᵀ diag(w) Φ over blocks of rows.

    Products are taken in the blocks' precision, and summed over blocks in float64. As H is symmetric, only panels on
    and above its diagonal are multiplied.

    Args:
        blocks: pairs of features (r, k) and weights w (r,), at least one; None for w = 1.

    Returns:
        H, (k, k), float64.

    Raises:
        ValueError: if a weight is negative: H would not be positive definite.

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> gram([(features, torch.tensor([2.0, 1.0]))])
    tensor([[3., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    total: Tensor | None = None
    for features, weights in blocks:
        if weights is not None and bool((weights < 0).any()):
            raise ValueError(
                f"The curvature ∂²L/∂f² is negative for {int((weights < 0).sum())} examples (least:"
                f" {weights.min().item():.3g}): output_to_loss is not convex in the output. Use"
                " TRAKCallback(curvature=False), or override out_to_loss_curvature."
            )
        weighted = features if weights is None else features * weights[:, None]
        k = features.shape[1]
        if total is None:
            total = torch.zeros(k, k, dtype=torch.float64, device=features.device)
        for first in range(0, k, _PANEL):
            last = first + _PANEL
            with full_precision():
                total[first:last, first:] += weighted[:, first:last].T @ features[:, first:]
    if total is None:
        raise ValueError("gram needs at least one block of features.")
    for first in range(0, len(total), _PANEL):
        last = first + _PANEL
        total[last:, first:last] = total[first:last, last:].T
    return total


@dataclass(frozen=True)
class CholeskyFactor:
    """The lower Cholesky factor of H + λ·mean(diag H)·I, (k, k), float64. `factor` makes it, `solve` uses it."""

    lower: Tensor


def factor(kernel: Tensor, damping: float) -> CholeskyFactor:
    """Damp a kernel relative to its mean diagonal and factor it: H + λ·mean(diag H)·I = L Lᵀ.

    Relative damping means the same whatever the scale of the gradients and the size of the train set.

    Args:
        kernel: H, (k, k), symmetric, positive semi-definite; it is overwritten, as a copy would be large.
        damping: λ ≥ 0.

    Raises:
        ValueError: if the damped kernel is not numerically positive definite.

    >>> state = factor(2 * torch.eye(2, dtype=torch.float64), damping=0.5)
    >>> solve(state, torch.tensor([[3.0, 6.0]]))
    tensor([[1., 2.]])
    """
    scale = kernel.diagonal().mean()
    if not bool(torch.isfinite(scale)) or scale <= 0:
        raise ValueError(
            f"The kernel H has a mean diagonal of {scale.item():.3g}: all gradients or all curvatures vanish or are not"
            " finite. Attribute checkpoints whose training loss is not exactly zero, or use curvature=False."
        )
    kernel.diagonal().add_(damping * scale)
    diagonal, rank = kernel.diagonal().clone(), effective_rank(kernel)
    columns = kernel.mT  # the same, in the order of LAPACK
    info = torch.empty((), dtype=torch.int32, device=kernel.device)
    lower, info = torch.linalg.cholesky_ex(columns, out=(columns, info))
    pivots = lower.diagonal().square()
    # Features are float32, so a kernel is known to about k·ε of its largest entries: beyond that it is singular.
    if int(info) or bool(pivots.min() < 1e-7 * pivots.max()):
        least = 0.0 if int(info) else pivots.min()  # the least eigenvalue is at most that
        condition = diagonal.max() / least
        raise ValueError(
            f"The kernel H, ({len(kernel)}, {len(kernel)}), is singular or nearly so with damping={damping:g}"
            f" (condition number ≥ {condition.item():.2g}, effective rank {rank:.1f}): there are too few"
            " or too similar training examples for so many features. Set TRAKCallback(damping='auto'), or a proj_dim"
            " well below the number of training examples."
        )
    return CholeskyFactor(lower)


def effective_rank(kernel: Tensor) -> float:
    """Return (tr H)² / ‖H‖², the number of equal eigenvalues that would have the same mean and mean square.

    >>> round(effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0]))), 4)
    2.0
    """
    return ((kernel.diagonal().sum() / torch.linalg.matrix_norm(kernel)) ** 2).item()


def solve(state: CholeskyFactor, vectors: Tensor) -> Tensor:
    """Return (H + λ·mean(diag H)·I)⁻¹ x for every row x of ``vectors``, (m, k) → (m, k), in their own precision."""
    half = torch.linalg.solve_triangular(state.lower, vectors.to(state.lower.dtype).T, upper=False)
    solved = torch.linalg.solve_triangular(state.lower.mT, half, upper=True).T  # cholesky_solve would copy the factor
    return solved.to(vectors.dtype).contiguous()


def quadratic_form(state: CholeskyFactor, vectors: Tensor) -> Tensor:
    """Return xᵀ (H + λ·mean(diag H)·I)⁻¹ x for every row x of ``vectors``, (m, k) → (m,): ‖L⁻¹x‖², so one solve does.

    >>> quadratic_form(factor(2 * torch.eye(2, dtype=torch.float64), damping=0.5), torch.tensor([[3.0, 6.0]]))
    tensor([15.])
    """
    half = torch.linalg.solve_triangular(state.lower, vectors.to(state.lower.dtype).T, upper=False)
    return half.square().sum(0).to(vectors.dtype)
