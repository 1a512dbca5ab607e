"""The factored projection: it projects layers' inputs and output gradients, and forms no per-sample gradient."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lightning_trak.gradients.gradient import Gradient, as_rows, is_word_table, matrix_shape
from lightning_trak.projection.philox import random_signs
from lightning_trak.projection.projector import Drawn, Projector
from lightning_trak.projection.sparse import SparseProjector

_MORE = 8  # times r: the columns of an embedding table's L
_LEFT, _RIGHT = 2, 3  # fourth word of the Philox counter; the sparse projection has 1, the dense one 0


class FactoredProjector(Projector):
    """P = (L ⊗ R) S: every layer's gradient G becomes LᵀGR, and S projects these into one feature vector.

    L, (O, r), and R, (I, r), have independent entries ±1/√r, equally likely. An axis of at most r entries stays as it
    is. A parameter with O ≥ 8 I is taken for an embedding table. Its L is (O, 8 r) with entries ±1/√(8 r), since what
    identifies a text is a few rows of the table. S is the matrix of the `SparseProjector`.

    The three are independent, with E[L Lᵀ] = I, E[R Rᵀ] = I and E[S Sᵀ] = I. Hence E[P Pᵀ] = I. For G = Σₜ gₜ aₜᵀ,
    LᵀGR = Σₜ (Lᵀgₜ)(Rᵀaₜ)ᵀ, which costs as much as two layers of width r.

    Some parameters go into S as they are: those of one axis, of fewer than r rows, or of at most r² entries.

    Row i of L is drawn from Philox at counter (start + i, j div 128, 2), row i of R at (start + i, j div 128, 3). Here,
    start is the index of the parameter's first entry among all p. Projecting the factors is the idea of Choe et al.,
    "What is your data worth to GPT?", arXiv 2405.13954, Section 3.

    Args:
        proj_dim: k.
        rank: r.

    >>> from lightning_trak.gradients import OuterGradient
    >>> projector, features = FactoredProjector(proj_dim=16, rank=4), torch.zeros(2, 16)
    >>> gradient = OuterGradient(torch.ones(2, 7, 10), torch.ones(2, 7, 20))
    >>> projector.add_gradient_(features, gradient, start=0, key=0)
    """

    name = "factored"

    def __init__(self, proj_dim: int = 2048, rank: int = 64) -> None:
        super().__init__(proj_dim)
        self.rank = rank
        self._sparse = SparseProjector(proj_dim)
        self._drawn = Drawn()

    def add_(self, features: Tensor, gradients: Tensor, start: int, key: int) -> None:
        """Add entries as they are, by the sparse projection alone; see `Projector.add_`."""
        self._sparse.add_(features, gradients, start, key)

    def add_gradient_(self, features: Tensor, gradient: Gradient, start: int, key: int) -> None:
        """Add LᵀGR; see `Projector.add_gradient_`."""
        shape = gradient.shape
        if len(shape) < 2 or shape[0] < self.rank or prod(shape) <= self.rank**2:
            super().add_gradient_(features, gradient, start, key)
            return
        rows, columns = matrix_shape(shape)
        left_rank = self.rank * (_MORE if is_word_table(shape) else 1)
        left = self._matrix(start, rows, left_rank, _LEFT, key, features.device)
        right = self._matrix(start, columns, self.rank, _RIGHT, key, features.device)
        self._sparse.add_(features, as_rows(gradient.sketch(left, right)).float(), start, key)

    def _matrix(self, start: int, rows: int, rank: int, side: int, key: int, device: torch.device) -> Tensor | None:
        """Return L or R, cached for the next batch; None where the axis stays as it is."""
        if rows <= rank:
            return None
        return self._drawn.get(
            key,
            (start, rows, side, device),
            lambda: random_signs(start, start + rows, rank, key, side, device) * rank**-0.5,
        )

    def forget(self) -> None:
        """Free the matrices and the buckets."""
        self._drawn.forget()
        self._sparse.forget()
