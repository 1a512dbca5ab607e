"""Gradients in the eigenbasis of the curvature, each direction divided by the root of its damped eigenvalue."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from lightning_trak.curvature.kronecker import Curvature
from lightning_trak.gradients import Gradient
from lightning_trak.projection import Projector


class Whitening(Projector):
    """φ = (Λ + λ)^(−½) ⊙ Q_Sᵀ ∇f Q_A, (b, p): inner products of φ are those with the inverse of the damped curvature.

    A parameter with neither curvature nor λ has zeros: the loss does not depend on it.

    Args:
        curvature: of all parameters.
        sizes: the number of entries of each attributed parameter, in order.
        damping: λ of each parameter, on the scale of Λ.
    """

    name = "whitening"

    def __init__(self, curvature: Curvature, sizes: Mapping[str, int], damping: Mapping[str, float]) -> None:
        super().__init__()
        starts = dict(zip(sizes, accumulate([0, *sizes.values()]), strict=False))
        self._parts = {
            starts[name]: (curvature.bases[name], _inverse_root(values + damping[name]))
            for name, values in curvature.eigenvalues.items()
        }

    def dimension(self, n_params: int) -> int:
        """Return ``n_params``."""
        return n_params

    def add_(self, features: Tensor, gradients: Tensor, start: int, key: int) -> None:
        """Not possible for a block of entries: the basis is that of the whole parameter; see `add_gradient_`."""
        raise NotImplementedError("Whitening takes whole parameters: call add_gradient_.")

    def add_gradient_(self, features: Tensor, gradient: Gradient, start: int, key: int) -> None:
        """Add the whitened gradients in the parameter's place; see `Projector.add_gradient_`."""
        if start not in self._parts:
            return
        basis, scales = self._parts[start]
        own = features[:, start : start + len(scales)]
        for rows, rotated in basis.rotated(gradient):
            own[rows].addcmul_(rotated, scales)


def rescaling(
    curvature: Curvature, sizes: Mapping[str, int], damping: Mapping[str, float], other: Mapping[str, float]
) -> Tensor:
    """Return √((Λ + λ) / (Λ + λ')), (p,), which turns features that are whitened with λ into those with λ'.

    Args:
        curvature: of all parameters.
        sizes: the number of entries of each attributed parameter, in order.
        damping: λ of each parameter.
        other: λ' of each parameter.

    >>> curvature = Curvature({}, {"weight": torch.tensor([1.0, 2.0])})
    >>> rescaling(curvature, {"weight": 2}, {"weight": 1.0}, {"weight": 0.0})
    tensor([1.4142, 1.2247])
    """
    parts = []
    for name, size in sizes.items():
        values = curvature.eigenvalues[name].cpu() if name in curvature.eigenvalues else torch.zeros(size)
        parts.append((values + damping.get(name, 0.0)).sqrt() * _inverse_root(values + other.get(name, 0.0)))
    return torch.cat(parts)


def _inverse_root(values: Tensor) -> Tensor:
    """Return 1 / √x, and 0 where x is 0."""
    return values.rsqrt().where(values > 0, 0)
