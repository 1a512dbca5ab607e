"""Sets of training examples that are left out: one Newton step on the loss of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_trak.influence.gauss_newton import GaussNewton, factor
from lightning_trak.influence.train_features import TrainFeatures

_LEAST_PIVOT = 1e-4  # relative to one: features are float32


@dataclass(frozen=True)
class LeftOut:
    """Sets of training examples, and the features of their members at one checkpoint.

    Attributes:
        masks: (s, n), bool; row t says which training examples are in set t.
        features: φ of the r examples that are in any set; a tensor, or a sparse matrix.
        loss_grads: for each set, q of these r examples; zero for those that are not in it, (s, r).
        weights: for each set, w of these r examples; zero for those that are not in it, (s, r).
    """

    masks: Tensor
    features: Any
    loss_grads: Tensor
    weights: Tensor

    @classmethod
    def of(cls, train: TrainFeatures, masks: Tensor) -> LeftOut:
        """Read the features of the members from the train set."""
        members = masks.any(0).nonzero()[:, 0]
        numbers = [torch.from_numpy(array)[members] * masks[:, members] for array in (train.loss_grad, train.curvature)]
        return cls(masks, train.rows(members), *numbers)


def step_without(sums: GaussNewton, damping: float, targets: Tensor, left_out: LeftOut, *, curvature: bool) -> Tensor:
    """Return the change of f(z) when sets of training examples are left out, (s, m); see `Estimator.without`.

    Let H = L Lᵀ be damped, and U = L⁻¹ Φ_Sᵀ. Then H_S = L (I − U diag(w) Uᵀ) Lᵀ.

    Args:
        sums: H of the whole train set, undamped; it is overwritten.
        damping: λ, relative to the mean diagonal of that H.
        targets: φ(z), (m, k).
        left_out: the sets.
        curvature: whether H is weighted with w.
    """
    lower, members = factor(sums.matrix, damping), left_out.masks.any(0)
    whitened = torch.linalg.solve_triangular(lower, left_out.features.to(lower).T, upper=False)
    steps = []
    for mask, q, w in zip(left_out.masks, left_out.loss_grads, left_out.weights, strict=True):
        own = mask[members].to(lower.device)
        roots = w.to(lower)[own].sqrt() if curvature else torch.ones_like(q.to(lower)[own])
        steps.append(_step_of_the_rest(whitened[:, own], q.to(lower)[own], roots))
    step = torch.linalg.solve_triangular(lower.mT, torch.stack(steps, 1), upper=True)
    return -(targets.to(lower) @ step).T.float().cpu()


def _step_of_the_rest(whitened: Tensor, q: Tensor, roots: Tensor) -> Tensor:
    """Return (I − V Vᵀ)⁻¹ U q, (k,), with V = U diag(roots), by the smaller of V Vᵀ and Vᵀ V."""
    sums, weighted = whitened @ q, whitened * roots
    if weighted.shape[1] > weighted.shape[0]:
        return _solve_rest(weighted @ weighted.T, sums)
    return sums + weighted @ _solve_rest(weighted.T @ weighted, weighted.T @ sums)


def _solve_rest(part: Tensor, vector: Tensor) -> Tensor:
    """Return (I − part)⁻¹ vector."""
    matrix = torch.eye(len(part), dtype=part.dtype, device=part.device) - part
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or bool((lower.diagonal() < _LEAST_PIVOT).any()):
        raise ValueError(
            "Without one of these sets the Gauss–Newton matrix H is singular: too few examples are left for so many"
            " features and so little damping. Leave out fewer, or set TRAKCallback(damping='auto')."
        )
    return torch.cholesky_solve(vector[:, None], lower)[:, 0]


def sums_without(n: int, targets: Any, left_out: LeftOut) -> Tensor:
    """Return the change of f(z) for features whitened by the whole curvature, where H of the rest is (n − |S|) I."""
    rest = n - left_out.masks.sum(1, keepdim=True)
    return -(left_out.loss_grads @ (left_out.features @ targets.T)) / rest
