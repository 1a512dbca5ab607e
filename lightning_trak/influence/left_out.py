"""Sets of training examples that are left out: one Newton step on the loss of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_trak.influence.gauss_newton import GaussNewton, add_products_, factor, mirror_, solve
from lightning_trak.influence.train_features import TrainFeatures


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

    Args:
        sums: H of the whole train set, undamped; it is overwritten.
        damping: λ, relative to the mean diagonal of that H.
        targets: φ(z), (m, k).
        left_out: the sets.
        curvature: whether H is weighted with w.
    """
    damped, device = sums.matrix, sums.matrix.device
    damped.diagonal().add_(damping * sums.scale)
    targets, features = targets.to(device), left_out.features.to(device)
    changes = []
    for mask, q, w in zip(left_out.masks, left_out.loss_grads, left_out.weights, strict=True):
        own = mask[left_out.masks.any(0)].to(device)
        part, q, w = features[own], q.to(device)[own], w.to(device)[own]
        rest = damped.clone()
        add_products_(rest, part, -w if curvature else -torch.ones_like(w))
        mirror_(rest)
        step = solve(factor(rest, 0.0), (q.double() @ part.double())[None])
        changes.append(-(targets.double() @ step[0]))
    return torch.stack(changes).float().cpu()


def sums_without(n: int, targets: Any, left_out: LeftOut) -> Tensor:
    """Return the change of f(z) for features whitened by the whole curvature, where H of the rest is (n − |S|) I."""
    rest = n - left_out.masks.sum(1, keepdim=True)
    return -(left_out.loss_grads @ (left_out.features @ targets.T)) / rest
