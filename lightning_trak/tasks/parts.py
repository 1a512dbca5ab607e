"""Examples of many parts with one output for all of them: pixels, tokens, labels, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_trak.tasks.base import TRAKMixin
from lightning_trak.tasks.batch import forward, labels, labels_in_range
from lightning_trak.tasks.draws import draw_classes
from lightning_trak.tasks.log_odds import log_odds


class PartsMixin(TRAKMixin):
    """Examples of many parts, each with a loss of its own, trained with the mean of these losses.

    With ℓ_i ≥ 0 the loss of part i, for the N parts of an example that count:

    - f = log(p / (1 − p)), with p = exp(−L);
    - L = softplus(−f) = Σ_i ℓ_i / N;
    - Q = 1 − p;
    - w = p (1 − p); the example has the weight N w in H, see `kernel_weight`.

    L is a function of f, so its gradient is exactly −Q ∇f. Examples count the same, however many parts they have.

    Mixins that define `draw_labels` and ``drawn_loss`` are attributed with gradients that are whitened by the curvature
    of all parts' losses, see ``TRAKCallback(preconditioner=...)``; then H and w are not used.

    Define `part_losses`, and `count_parts` where some parts do not count. Batches ``(x, y)`` and mappings with
    ``"labels"`` are understood; for others override `get_logits` and `get_labels`.

    >>> class Counts(PartsMixin, torch.nn.Linear):  # several counts for each example, with the Poisson loss
    ...     def part_losses(self, predictions, labels):
    ...         return torch.nn.functional.poisson_nll_loss(predictions, labels, full=True, reduction="none")
    >>> model, batch = Counts(4, 3), (torch.randn(2, 4), torch.tensor([[0, 4, 1], [2, 0, 0]]))
    >>> losses = model.part_losses(model(batch[0]), batch[1]).mean(1)
    >>> torch.allclose(model.output_to_loss(model.model_output(batch), batch), losses)
    True
    """

    def get_logits(self, batch: Any) -> Tensor:
        """Return the logits of ``batch``, (b, ...), or whatever the model predicts of the parts."""
        return forward(self, batch, "logits", "out", hook="get_logits")

    def get_labels(self, batch: Any) -> Tensor:
        """Return the labels of the parts, (b, ...)."""
        return labels(self, batch, hook="get_labels")

    def part_predictions(self, batch: Any) -> Tensor:
        """Return what `part_losses` needs of the model, (b, ...): the logits by default."""
        return self.get_logits(batch)

    def part_labels(self, batch: Any) -> Tensor:
        """Return what `part_losses` needs of the batch, (b, ...), without a forward pass: the labels by default."""
        return self.get_labels(batch)

    def part_losses(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Return the losses of the parts, (b, ...); zero for parts that do not count.

        Args:
            predictions: what `part_predictions` returned.
            labels: what `part_labels` returned.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define part_losses(self, predictions, labels), which returns the loss of every"
            " part, (b, ...)."
        )

    def count_parts(self, labels: Tensor) -> Tensor:
        """Return how many parts of every example count, (b,): by default all."""
        return torch.full((len(labels),), labels[:1].numel(), device=labels.device)

    def model_output(self, batch: Any) -> Tensor:
        """Return the log-odds of all parts of an example together, (b,)."""
        return self.output_of_parts(self.all_part_losses(batch), batch)

    def output_of_parts(self, losses: Tensor, batch: Any) -> Tensor:
        """Return f as a function of the losses of the parts, (b, ...) → (b,)."""
        return log_odds(losses.flatten(1).sum(1) / self.count_parts(self.part_labels(batch)).clamp(min=1))

    def all_part_losses(self, batch: Any) -> Tensor:
        """Return the losses of the parts of a batch, (b, ...); see `part_losses`."""
        return self.part_losses(self.part_predictions(batch), self.part_labels(batch))

    def share_of_parts(self, chosen: tuple[Any, Tensor]) -> Tensor:
        """Return a number whose gradient is the share of some parts in ∇f, (b,): Σ_t ∂f/∂ℓ_t ℓ_t, with ∂f/∂ℓ_t fixed.

        Args:
            chosen: the batch; and which parts, (b, ...), ones and zeros.
        """
        batch, which = chosen
        losses = self.all_part_losses(batch)
        slopes = torch.func.grad(lambda values: self.output_of_parts(values, batch).sum())(losses.detach())
        return (which * slopes * losses).flatten(1).sum(1)

    def kernel_weight(self, output: Tensor, batch: Any) -> Tensor:
        """Return the weight of every example in H, (b,): N w.

        An example adds weight · ∇f ∇fᵀ to H, a matrix of rank 1. The Gauss–Newton matrix of the mean loss of N parts
        has rank N. The weight N w gives both the same trace, if the parts are equally certain, and their gradients
        orthogonal and of equal norm.
        """
        return self.count_parts(self.part_labels(batch)) * super().kernel_weight(output, batch)


class ClassifiedPartsMixin(PartsMixin):
    """Parts that have a class each, trained with the cross-entropy of every part.

    Attributes:
        ignore_index: the label of parts that do not count.
    """

    ignore_index: int = -100
    _parts, _classes = "parts", "classes"  # what messages call them

    def logits_and_classes(self, predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of every part, (b, classes, ...), and its class, (b, ...), after checking their shapes."""
        return predictions, labels

    def part_losses(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of every part, (b, ...); zero for parts that do not count.

        Raises:
            ValueError: if a label is none of the classes, or shapes do not fit together.
        """
        logits, classes = self.logits_and_classes(predictions, labels)
        with labels_in_range(
            f"get_labels returned {self._classes} outside of 0 to {logits.shape[1] - 1}, those of get_logits",
            f"Set ignore_index, which is {self.ignore_index}, to the label of {self._parts} that do not count.",
        ):
            return cross_entropy(logits, classes.long(), ignore_index=self.ignore_index, reduction="none")

    def draw_labels(self, batch: Any, seeds: Sequence[int]) -> Tensor:
        """Return a class for every part, drawn from the predictions, (b, ...); ``ignore_index`` where none counts.

        See `TRAKMixin` for ``seeds``.
        """
        logits, classes = self.logits_and_classes(self.part_predictions(batch), self.part_labels(batch))
        return draw_classes(logits.movedim(1, -1), seeds).masked_fill(classes == self.ignore_index, self.ignore_index)

    def drawn_loss(self, drawn: tuple[Any, Tensor]) -> Tensor:
        """Return the sum of the cross-entropies of drawn classes, divided by √N, (b,), for N parts that count.

        On average, the outer product of its gradient is the Fisher information of L, the mean over parts: gradients of
        parts are independent if their labels are.
        """
        batch, classes = drawn
        logits, _ = self.logits_and_classes(self.part_predictions(batch), self.part_labels(batch))
        losses = cross_entropy(logits, classes, ignore_index=self.ignore_index, reduction="none").flatten(1).sum(1)
        return losses / (classes != self.ignore_index).flatten(1).sum(1).clamp(min=1).sqrt()

    def count_parts(self, labels: Tensor) -> Tensor:
        """Return how many parts of every example count, (b,)."""
        return (labels != self.ignore_index).flatten(1).sum(1)

    def reduce_losses(self, losses: Tensor, batch: Any) -> Tensor:
        """Return the mean over all parts of a batch that count."""
        counted = self.count_parts(self.part_labels(batch))
        return (losses * counted).sum() / counted.sum()
