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
_EXAMPLES, _EXAMPLES_OF_REST = (256, 1000), (128, 512)  # for eigenvectors and for eigenvalues
VERSION = 4  # count it up when the same examples come to other whitened features


@dataclass(frozen=True)
class Preconditioner:
    """How gradients are whitened and stored.

    At each checkpoint, labels are drawn from the predictions for some training examples. A pass over 256 of them gives
    the Kronecker factors of each parameter's Fisher information, a pass over 1000 its eigenvalues Λ; if labels are
    drawn of what the model output leaves open, 128 and 512 do. Gradients are then divided by √(Λ + λ) along the
    eigenvectors, and each training example's largest entries are stored. Scores are inner products of whitened
    gradients, times q / n: the influence with the inverse of the damped Fisher information, as in Grosse et al.,
    "Studying large language model generalization with influence functions", arXiv 2308.03296, Section 2.

    If labels are drawn of what the model output leaves open, the output's own curvature is added when scores are
    computed, see `OutputCurvature`.

    Attributes:
        entries: how many entries of each training example are stored: its largest.
        target_entries: how many of a target.
        damping: λ of each parameter, relative to its mean eigenvalue; ``"auto"``: see `whitening_damping`.
        basis_examples: how many training examples the eigenvectors are estimated from.
        examples: how many training examples the eigenvalues are estimated from.
        rest: whether labels are drawn of what the model output leaves open.
    """

    entries: int
    target_entries: int
    damping: float | str = "auto"
    basis_examples: int = _EXAMPLES[0]
    examples: int = _EXAMPLES[1]
    rest: bool = False

    @classmethod
    def of(cls, proj_dim: int, *, rest: bool) -> Preconditioner:
        """Return the defaults, with numbers of entries in proportion to ``proj_dim``.

        >>> Preconditioner.of(2048, rest=False).entries, Preconditioner.of(2048, rest=True).entries
        (256, 1024)
        """
        parts = _ENTRIES_OF_REST if rest else _ENTRIES
        entries, target_entries = (max(1, int(proj_dim * part)) for part in parts)
        few, many = _EXAMPLES_OF_REST if rest else _EXAMPLES
        return cls(entries, target_entries, basis_examples=few, examples=many, rest=rest)

    @property
    def configuration(self) -> dict[str, Any]:
        """All that stored features depend on, but λ, which can be changed: part of the store's manifest."""
        own = {name: value for name, value in asdict(self).items() if name != "damping"}
        return {"name": "kronecker", "version": VERSION, **own}


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
