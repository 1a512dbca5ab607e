"""Gradients in the eigenbasis of the curvature, each direction divided by the root of its damped eigenvalue."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_trak.curvature.kronecker import EigenBasis
from lightning_trak.gradients import Gradient
from lightning_trak.projection import Projector


class Whitening(Projector):
    """φ = (Λ + λ)^(−½) ⊙ Q_Sᵀ ∇f Q_A, (b, p): inner products of φ are those with the inverse of the damped curvature.

    Here λ is ``damping`` times the mean of Λ over the parameter. A parameter without curvature gets λ alone.

    Args:
        bases: the eigenbases of each parameter.
        eigenvalues: Λ of each parameter, (O·I,).
        starts: the index of each parameter's first entry among all p.
        damping: relative to the mean eigenvalue of each parameter.
    """

    name = "whitening"

    def __init__(
        self,
        bases: Mapping[str, EigenBasis],
        eigenvalues: Mapping[str, Tensor],
        starts: Mapping[str, int],
        damping: float,
    ) -> None:
        super().__init__()
        self._parts = {starts[name]: (bases[name], _scales(eigenvalues[name], damping)) for name in starts}

    def dimension(self, n_params: int) -> int:
        """Return ``n_params``."""
        return n_params

    def add_(self, features: Tensor, gradients: Tensor, start: int, key: int) -> None:
        """Not possible for a block of entries: the basis is that of the whole parameter; see `add_gradient_`."""
        raise NotImplementedError("Whitening takes whole parameters: call add_gradient_.")

    def add_gradient_(self, features: Tensor, gradient: Gradient, start: int, key: int) -> None:
        """Add the whitened gradients in the parameter's place; see `Projector.add_gradient_`."""
        basis, scales = self._parts[start]
        features[:, start : start + len(scales)] += basis.rotate(gradient) * scales


def _scales(eigenvalues: Tensor, damping: float) -> Tensor:
    """Return (Λ + λ)^(−½); zero where the parameter has no curvature at all."""
    mean = eigenvalues.mean()
    if mean <= 0:
        return torch.zeros_like(eigenvalues)
    return (eigenvalues + damping * mean).rsqrt()
