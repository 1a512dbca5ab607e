"""Losses that are no function of the model output: Q by projecting their gradients on those of the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_trak.features.featurizer import Features, Featurizer
from lightning_trak.gradients import Selector, Trial

PER_SAMPLE_LOSS = "per_sample_loss"
_LITTLE = 0.5  # of the loss's gradients: if less is along the output's, it is doubtful


def project_loss(features: Tensor, loss_features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the multiple of each example's ∇f that is nearest to its −∇L, and what is left.

    Q = −⟨∇L, ∇f⟩ / ‖∇f‖² minimises ‖∇L + Q ∇f‖; where L is a function of f, it is −∂L/∂f. Gradients may be replaced by
    their features, whose products are those of the gradients in expectation.

    Args:
        features: of f, (b, k).
        loss_features: of L, (b, k), by the same projection.

    Returns:
        Q, (b,), and ‖∇L + Q ∇f‖², (b,). Where ∇f is zero, Q is zero.

    >>> features = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> project_loss(features, torch.tensor([[-3.0, 0.0], [1.0, 1.0]]))
    (tensor([ 3.0000, -0.5000]), tensor([0., 1.]))
    """
    squares = features.square().sum(1)
    products = (features * loss_features).sum(1)
    loss_grad = torch.where(squares > 0, -products / squares, 0)
    return loss_grad, (loss_features + loss_grad[:, None] * features).square().sum(1)


def projected_curvature(loss_grad: Tensor, losses: Tensor) -> Tensor:
    """Return w of losses that are taken for half the square of a number: Q² / (2 L).

    With L = g² / 2 the Gauss-Newton curvature of L is ∇g ∇gᵀ = ∇L ∇Lᵀ / (2 L), and so Q² / (2 L) along ∇f. It is 2 for
    squared errors L = (f − y)², as it should be; of cross-entropies, with Q = 1 − p, half of p (1 − p) for p near 1. A
    loss on another scale has w on that scale. Of negative losses, logarithms of densities, it is Q²: the empirical
    Fisher information.

    Args:
        loss_grad: Q, (b,).
        losses: L, (b,).

    >>> residual = torch.tensor([0.5, -3.0])
    >>> projected_curvature(-2 * residual, residual**2)
    tensor([2., 2.])
    """
    halves = (2 * losses).clamp(min=torch.finfo(losses.dtype).eps)  # what rounding leaves of a loss of zero
    return loss_grad.square() / torch.where(losses < 0, 1, halves)


class LossProjection:
    """Q of the examples of a checkpoint whose module has a loss of its own for each, ``per_sample_loss``.

    It costs a second forward and backward pass.

    Args:
        gradients: ``"auto"`` or the name of an engine.
        read: returns a few examples, their number, and the first of them alone, to prepare an engine on.

    Attributes:
        negative: whether w was taken of a negative loss.
    """

    def __init__(self, gradients: str, read: Callable[[], tuple[Any, int, Any]]) -> None:
        self._selector = Selector(gradients)
        self._read = read
        self._whole, self._left = 0.0, 0.0
        self.negative = False

    def explained(self) -> float:
        """Return the part of the squared norms of all ∇L so far that is along ∇f; 1 where all are zero."""
        return 1 - self._left / self._whole if self._whole else 1.0

    def __call__(self, featurizer: Featurizer, batch: Any, result: Features) -> tuple[Tensor, Tensor]:
        """Return Q and L, (b,) each, of a batch.

        Args:
            featurizer: what its features were computed by.
            batch: the batch.
            result: its features, and outputs.
        """
        size = len(result.features)
        losses = self._featurized(featurizer, batch, size)
        loss_grad, left = project_loss(result.features, losses.features)
        self._whole += losses.features.square().sum().item()
        self._left += left.sum().item()
        return loss_grad, losses.outputs.to(loss_grad)

    def curvature(self, loss_grad: Tensor, losses: Tensor) -> Tensor:
        """Return w, (b,), of Q and L; see `projected_curvature`."""
        self.negative |= bool((losses < 0).any())
        return projected_curvature(loss_grad, losses)

    def __str__(self) -> str:
        return f"Q by projection, {self._selector}: {self._found()}"

    def doubts(self) -> dict[str, str]:
        """Return what the user should be warned of, by its kind."""
        doubts = {}
        if self.explained() < _LITTLE:
            doubts["little explained"] = (
                f"Only {self._found()}; scores leave the rest out. Attribute an output that the loss is a function of,"
                " as minus its square root, with output_to_loss(self, output, batch): output.square()."
            )
        if self.negative:
            doubts["negative losses"] = (
                f"{PER_SAMPLE_LOSS} is negative for some examples; their curvature is taken for Q², as of logarithms of"
                " densities. Define out_to_loss_curvature(self, batch) if you know it."
            )
        return doubts

    def _found(self) -> str:
        part = f"{self.explained():.1%} of the gradients of {PER_SAMPLE_LOSS} (of their squared norms)"
        return f"{part} are along model_output's"

    def _featurized(self, featurizer: Featurizer, batch: Any, size: int) -> Features:
        """Featurize the losses of a batch, with another engine if one turns out not to suit them."""
        function = featurizer.function.of(PER_SAMPLE_LOSS)
        return self._selector.attempt(
            function,
            lambda: Trial(function, *self._read()),
            batch,
            size,
            lambda engine: featurizer.of(PER_SAMPLE_LOSS, engine)(batch, size),
        )
