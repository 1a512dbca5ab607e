"""Q of losses that are not a function of the model output: ∇L is projected onto ∇f."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_trak.features.featurizer import Features, Featurizer
from lightning_trak.gradients import Selector, Trial

PER_SAMPLE_LOSS = "per_sample_loss"
_LITTLE = 0.5  # of ‖∇L‖²: if less lies along ∇f, the user is warned


def project_loss(features: Tensor, loss_features: Tensor) -> tuple[Tensor, Tensor]:
    """Project each example's −∇L onto its ∇f; return the coefficient Q and the squared residual.

    Q = −⟨∇L, ∇f⟩ / ‖∇f‖² minimises ‖∇L + Q ∇f‖. Where L is a function of f, Q is −∂L/∂f. Features stand in for the
    gradients: in expectation, they have the same inner products.

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
    """Return w = Q² / (2 L), which takes each loss for half a square.

    For L = g² / 2, the Gauss–Newton matrix of L is ∇g ∇gᵀ = ∇L ∇Lᵀ / (2 L), and so Q² / (2 L) along ∇f. For squared
    errors L = (f − y)² that is 2, the exact value. For cross-entropies, where Q = 1 − p, it is half of p (1 − p) for p
    near 1. If the loss is rescaled, w is rescaled with it. Negative losses, such as those from log-densities, are no
    squares: their w is Q², the empirical Fisher information.

    Args:
        loss_grad: Q, (b,).
        losses: L, (b,).

    >>> residual = torch.tensor([0.5, -3.0])
    >>> projected_curvature(-2 * residual, residual**2)
    tensor([2., 2.])
    """
    halves = (2 * losses).clamp(min=torch.finfo(losses.dtype).eps)  # a loss of zero, up to rounding
    return loss_grad.square() / torch.where(losses < 0, 1, halves)


class LossProjection:
    """Q of the examples at one checkpoint, for a module that defines ``per_sample_loss``.

    It costs a second forward and backward pass.

    Args:
        gradients: ``"auto"`` or the name of an engine.
        read: returns a few examples, their number, and the first of them alone, to prepare an engine on.

    Attributes:
        negative: whether w was computed for a negative loss.
        seen: the number of examples so far.
    """

    def __init__(self, gradients: str, read: Callable[[], tuple[Any, int, Any]]) -> None:
        self._selector = Selector(gradients)
        self._read = read
        self._whole, self._left = 0.0, 0.0
        self.negative = False
        self.seen = 0

    def explained(self) -> float:
        """Return which part of all ‖∇L‖² so far lies along ∇f; 1 if all ∇L are zero."""
        return 1 - self._left / self._whole if self._whole else 1.0

    def __call__(self, featurizer: Featurizer, batch: Any, result: Features) -> tuple[Tensor, Tensor]:
        """Return Q and L of a batch, (b,) each."""
        size = len(result.features)
        losses = self._featurized(featurizer, batch, size)
        loss_grad, left = project_loss(result.features, losses.features)
        self._whole += losses.features.square().sum().item()
        self._left += left.sum().item()
        self.seen += size
        return loss_grad, losses.outputs.to(loss_grad)

    def curvature(self, loss_grad: Tensor, losses: Tensor) -> Tensor:
        """Return w, (b,), of Q and L; see `projected_curvature`."""
        self.negative |= bool((losses < 0).any())
        return projected_curvature(loss_grad, losses)

    def __str__(self) -> str:
        return f"Q by projection, {self._selector}: {self._found()}"

    def doubts(self) -> dict[str, str]:
        """Return the warnings for the user, by kind."""
        doubts = {}
        if self.explained() < _LITTLE:
            doubts["little explained"] = (
                f"Only {self._found()}; the scores leave out the rest. Attribute an output of which the loss is a"
                " function, e.g. minus its square root, with output_to_loss(self, output, batch): output.square()."
            )
        if self.negative:
            doubts["negative losses"] = (
                f"{PER_SAMPLE_LOSS} is negative for some examples. Their curvature is taken to be Q², as for"
                " log-densities. If you know the curvature, define out_to_loss_curvature(self, batch)."
            )
        return doubts

    def _found(self) -> str:
        part = f"{self.explained():.1%} of the gradients of {PER_SAMPLE_LOSS} (of their squared norms)"
        return f"{part} are along model_output's"

    def _featurized(self, featurizer: Featurizer, batch: Any, size: int) -> Features:
        """Featurize the losses of a batch; if an engine turns out not to support them, use another."""
        function = featurizer.function.of(PER_SAMPLE_LOSS)
        return self._selector.attempt(
            function,
            lambda: Trial(function, *self._read()),
            batch,
            size,
            lambda engine: featurizer.of(PER_SAMPLE_LOSS, engine)(batch, size),
        )
