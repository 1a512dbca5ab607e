"""The curvature of the outputs, w ∇f ∇fᵀ, beside that of whitened features: solved among examples, not entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_trak.influence.left_out import LeftOut
from lightning_trak.influence.train_features import CPU, Matrix, TrainFeatures, combined, evenly_spaced, gram
from lightning_trak.precision import full_precision

LARGEST = 4096  # examples in the matrix, which is dense and factored
_TINY = 1e-30


@dataclass(frozen=True)
class Corrected:
    """x(z) = φ(z) − Σ_s α_s φ_s for targets z: whitened features, less what the outputs' curvature takes of them.

    Attributes:
        targets: φ(z), m rows.
        sample: φ_s of some training examples, s rows.
        parts: α, (m, s).
    """

    targets: Any
    sample: Any
    parts: Tensor

    def __len__(self) -> int:
        return len(self.parts)

    def to(self, device: torch.device) -> Corrected:
        """Return it on a device."""
        return Corrected(self.targets.to(device), self.sample.to(device), self.parts.to(device))

    def __mul__(self, number: float) -> Corrected:
        return Corrected(self.targets * number, self.sample, self.parts * number)

    def products(self, features: Matrix) -> Tensor:
        """Return x(z)ᵀ φ for every row φ of ``features``, (r, m): of two ways that with fewer multiplications."""
        if len(self) < len(self.sample):
            return features @ self.targets.T - features @ combined(self.sample, self.parts)
        return features @ self.targets.T - (features @ self.sample.T) @ self.parts.T


class OutputCurvature:
    """H / n = I + Φᵀ diag(w / n) Φ: the Fisher information of outputs, and of what they leave open.

    By the chain rule, the Fisher information of a label is w ∇f ∇fᵀ, of the output, plus that of the other labels among
    themselves. The features Φ are whitened by the second, which thus is I. With R = diag(w)^½ Φ, the identity of
    Woodbury says

        n H⁻¹ φ = φ − Rᵀ (n I + R Rᵀ)⁻¹ R φ.

    A matrix of n rows is factored, whatever the number of entries. Of more than 4096 training examples, evenly
    spaced ones stand for all. Then an example's own part in H is put right: see `factor`. Without its own part, it
    would look as if nothing like it were in the train set.

    Args:
        train: whitened features of the train set.
        device: where matrices are multiplied.
        largest: how many examples are in the matrix, at most.

    >>> train = TrainFeatures(np.eye(2, dtype="f4"), np.ones(2, "f4"), np.array([2, 0], "f4"), squares=np.ones(2, "f4"))
    >>> OutputCurvature(train).solve(torch.eye(2)).products(torch.eye(2))
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """

    def __init__(self, train: TrainFeatures, device: torch.device = CPU, largest: int = LARGEST) -> None:
        n = train.shape[0]
        self._train, self._device = train, device
        self._chosen = evenly_spaced(n, largest).unique()
        self._count = len(self._chosen)
        self._roots = torch.from_numpy(np.array(train.curvature))[self._chosen].clamp(min=0).sqrt().to(device)
        self._sample = train.rows(self._chosen, device)
        with full_precision():
            self._products = gram(self._sample)
        self._lower = self._factor(self._roots, self._count)

    def solve(self, targets: Any) -> Corrected:
        """Return n H⁻¹ φ(z) of the targets, in which own parts are not put right: see `factor`."""
        targets = targets.to(self._device)
        with full_precision():
            products = self._roots[:, None] * (self._sample @ targets.T)
        parts = torch.cholesky_solve(products.double(), self._lower)
        return Corrected(targets, self._sample, (self._roots[:, None] * parts).float().T.contiguous())

    def own_part(self) -> Tensor:
        """Return φᵀ n H⁻¹ φ of every training example, (n,)."""
        if self._count == self._train.shape[0]:
            return self._leverages(self._products, self._products.diagonal()).float().cpu()
        leverages = []
        for _, features, *_ in self._train.blocks(self._count, self._device):
            with full_precision():
                products = self._sample @ features.T
            own = features.squares() if hasattr(features, "squares") else features.square().sum(1)
            leverages.append(self._leverages(products, own).cpu())
        found, (missing, surplus) = torch.cat(leverages), self._own_weights()
        return (found / (1 + (missing - surplus) * found)).float()

    def factor(self) -> Tensor | None:
        """Return by what to multiply scores to put own parts right, (n,); None where they are right.

        By the formula of Sherman and Morrison, this depends on ℓ = φᵀ n H⁻¹ φ. For an example that is not among the
        chosen ones, ℓ is estimated to be in proportion to ‖φ‖², as it is for the chosen ones on average.
        """
        if self._count == self._train.shape[0]:
            return None
        right, wrong = self._own_weights()
        squares = torch.from_numpy(np.array(self._train.squares)).double()
        leverages = self._leverages(self._products, self._products.diagonal()).cpu()
        others = leverages / (1 - wrong[self._chosen] * leverages)  # with H of the other examples
        found = squares * (others.sum() / squares[self._chosen].sum().clamp(min=_TINY))
        found[self._chosen] = others
        return ((1 + wrong * found) / (1 + right * found)).float()

    def _own_weights(self) -> tuple[Tensor, Tensor]:
        """Return the weight of φ φᵀ of every training example in H / n, as it should be and as it is, (n,) each."""
        weights = torch.from_numpy(np.array(self._train.curvature)).clamp(min=0).double()
        present = torch.zeros_like(weights)
        present[self._chosen] = weights[self._chosen] / self._count
        return weights / len(weights), present

    def _leverages(self, products: Tensor, own: Tensor) -> Tensor:
        """Return φᵀ n H⁻¹ φ of examples, with H as it is, (r,), from their Φ φ, (s, r), and ‖φ‖², (r,)."""
        half = torch.linalg.solve_triangular(self._lower, self._roots[:, None] * products.double(), upper=False)
        return (own.double() - half.square().sum(0)).clamp(min=0)

    def without(self, targets: Any, left_out: LeftOut) -> Tensor:
        """Return the change of f(z) when sets of training examples are left out, (s, m); see `Estimator.without`.

        H of the rest has n − |S| in place of n, and lacks the outputs' curvature of S.
        """
        n, targets, members = self._train.shape[0], targets.to(self._device), left_out.features.to(self._device)
        with full_precision():
            direct, samples = members @ targets.T, (self._sample @ targets.T).double()
            between = (self._sample @ members.T).double()
        changes = []
        for mask, q in zip(left_out.masks, left_out.loss_grads, strict=True):
            left, q = n - int(mask.sum()), q.double().to(self._device)
            roots = self._roots.masked_fill(mask[self._chosen].to(self._device), 0)
            lower = self._factor(roots, self._count * left / n)
            parts = torch.cholesky_solve((roots * (between @ q))[:, None], lower)[:, 0]
            changes.append((samples.T @ (roots * parts) - direct.T.double() @ q) / left)
        return torch.stack(changes).float().cpu()

    def _factor(self, roots: Tensor, diagonal: float) -> Tensor:
        """Return the Cholesky factor of a multiple of the identity plus R Rᵀ, with R = diag(roots) Φ."""
        matrix = roots[:, None] * self._products.double() * roots
        matrix.diagonal().add_(diagonal)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            raise ValueError(
                "The curvature of the outputs is so much larger than the damping that scores of whitened gradients"
                " cannot be computed. Leave damping out of TRAKCallback, or set a larger one: it is relative to the"
                " mean eigenvalue of each parameter."
            )
        return lower
