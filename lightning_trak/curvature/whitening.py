"""Gradients in the eigenbasis of the curvature, each direction divided by the root of its damped eigenvalue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_trak.curvature.kronecker import Curvature
from lightning_trak.gradients import Gradient
from lightning_trak.projection import Projector

# Of training examples and of targets, how many entries are kept: so many times proj_dim.
_ENTRIES = (1 / 8, 1.0)
_ENTRIES_OF_REST = (1 / 2, 4.0)  # there the largest hold less of the whole
VERSION = 3  # count it up when the same examples come to other whitened features


@dataclass(frozen=True)
class Preconditioner:
    """How gradients are whitened and stored.

    At each checkpoint, labels are drawn from the predictions for some training examples. A pass over 256 of them gives
    the Kronecker factors of each parameter's Fisher information, a pass over 1000 its eigenvalues Λ. Gradients are then
    divided by √(Λ + λ) along the eigenvectors, and each training example's largest entries are stored. Scores are inner
    products of whitened gradients, times q / n: the influence with the inverse of the damped Fisher information, as in
    Grosse et al., "Studying large language model generalization with influence functions", arXiv 2308.03296, Section 2.

    If labels are drawn of what the model output leaves open, the output's own curvature is added when scores are
    computed, see `OutputCurvature`. Then λ follows from the training time, where that is known.

    Attributes:
        entries: how many entries of each training example are stored: its largest.
        target_entries: how many of a target.
        damping: λ of each parameter, relative to its mean eigenvalue; None: from the training time, else 1.
        examples: how many training examples the eigenvalues are estimated from.
        basis_examples: how many training examples their eigenvectors are estimated from.
        rest: whether labels are drawn of what the model output leaves open.
    """

    entries: int
    target_entries: int
    damping: float | None = 1.0
    examples: int = 1000
    basis_examples: int = 256
    rest: bool = False

    @classmethod
    def of(cls, proj_dim: int, *, rest: bool) -> Preconditioner:
        """Return the defaults, with numbers of entries in proportion to ``proj_dim``.

        >>> Preconditioner.of(2048, rest=False).entries, Preconditioner.of(2048, rest=True).entries
        (256, 1024)
        """
        parts = _ENTRIES_OF_REST if rest else _ENTRIES
        entries, target_entries = (max(1, int(proj_dim * part)) for part in parts)
        return cls(entries, target_entries, damping=None if rest else 1.0, rest=rest)

    @property
    def configuration(self) -> dict[str, Any]:
        """All that features depend on: part of the store's manifest."""
        return {"name": "kronecker", "version": VERSION, **asdict(self)}


class Whitening(Projector):
    """φ = (Λ + λ)^(−½) ⊙ Q_Sᵀ ∇f Q_A, (b, p): inner products of φ are those with the inverse of the damped curvature.

    Here λ is the curvature's strength; if it has none, ``damping`` times the mean of Λ over the parameter. Then a
    parameter without curvature has zeros: the loss does not depend on it.

    Args:
        curvature: of all parameters.
        sizes: the number of entries of each attributed parameter, in order.
        damping: relative to the mean eigenvalue of each parameter.
    """

    name = "whitening"

    def __init__(
        self,
        curvature: Curvature,
        sizes: Mapping[str, int],
        damping: float,
    ) -> None:
        super().__init__()
        starts = dict(zip(sizes, accumulate([0, *sizes.values()]), strict=False))
        self._parts = {
            starts[name]: (curvature.bases[name], _scales(values, damping, curvature.strength))
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


def rescaling(curvature: Curvature, sizes: Mapping[str, int], strength: float) -> Tensor:
    """Return √((Λ + λ) / (Λ + λ')), (p,), which turns features that are whitened with λ into those with λ'.

    Args:
        curvature: of all parameters, with its strength λ.
        sizes: the number of entries of each attributed parameter, in order.
        strength: λ'.

    >>> curvature = Curvature({}, {"weight": torch.tensor([1.0, 2.0])}, strength=1.0)
    >>> rescaling(curvature, {"weight": 2}, strength=0.0)
    tensor([1.4142, 1.2247])
    """
    assert curvature.strength is not None
    zeros = {name: torch.zeros(size) for name, size in sizes.items()}
    values = torch.cat([curvature.eigenvalues.get(name, zeros[name]).cpu() for name in sizes])
    return ((values + curvature.strength) / (values + strength)).sqrt()


def _scales(eigenvalues: Tensor, damping: float, strength: float | None) -> Tensor:
    """Return (Λ + λ)^(−½); zero where the parameter has no curvature at all."""
    if strength is not None:
        return (eigenvalues + strength).rsqrt()
    mean = eigenvalues.mean()
    if mean <= 0:
        return torch.zeros_like(eigenvalues)
    return (eigenvalues + damping * mean).rsqrt()
