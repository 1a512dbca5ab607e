"""Gradients in the eigenbasis of the curvature, each direction divided by the root of its damped eigenvalue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_trak.curvature.kronecker import Curvature
from lightning_trak.gradients import Gradient
from lightning_trak.projection import Projector

VERSION = 1  # count it up when the same examples come to other whitened features


@dataclass(frozen=True)
class Preconditioner:
    """How gradients are whitened and stored.

    At each checkpoint, labels are drawn from the predictions for some training examples. A first pass over them gives
    the Kronecker factors of each parameter's Fisher information, a second its eigenvalues Λ. Gradients are then divided
    by √(Λ + λ) along the eigenvectors, and each training example's largest entries are stored. Scores are inner
    products of whitened gradients, times q / n: the influence with the inverse of the damped Fisher information, as in
    Grosse et al., "Studying large language model generalization with influence functions", arXiv 2308.03296, Section 2.

    Attributes:
        entries: how many entries of each training example are stored: its largest.
        damping: λ of each parameter, relative to its mean eigenvalue.
        examples: how many training examples the curvature is estimated from.
    """

    entries: int
    damping: float = 1.0
    examples: int = 1000

    @property
    def configuration(self) -> dict[str, Any]:
        """All that features depend on: part of the store's manifest."""
        return {"name": "kronecker", "version": VERSION, **asdict(self)}


class Whitening(Projector):
    """φ = (Λ + λ)^(−½) ⊙ Q_Sᵀ ∇f Q_A, (b, p): inner products of φ are those with the inverse of the damped curvature.

    Here λ is ``damping`` times the mean of Λ over the parameter. A parameter without curvature gets λ alone.

    Args:
        curvature: of all parameters.
        parameters: their names, in order.
        damping: relative to the mean eigenvalue of each parameter.
    """

    name = "whitening"

    def __init__(
        self,
        curvature: Curvature,
        parameters: Sequence[str],
        damping: float,
    ) -> None:
        super().__init__()
        scales = [_scales(curvature.eigenvalues[name], damping) for name in parameters]
        starts = accumulate([0, *map(len, scales)])
        bases = [curvature.bases[name] for name in parameters]
        self._parts = {start: (basis, scale) for start, basis, scale in zip(starts, bases, scales, strict=False)}

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
