"""Regression of one or several numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_trak.tasks.batch import forward, has_labels, labels, labels_or_none
from lightning_trak.tasks.draws import draw_signs
from lightning_trak.tasks.parts import PartsMixin


class RegressionMixin(PartsMixin):
    """Regression, trained with the mean squared error.

    With prediction ŷ = forward(x) and label y, each a single number:

    - f = ŷ: a positive score says that the training example raises the prediction, whether that is right or wrong;
    - L = (f − y)²;
    - Q = 2 (y − f);
    - w = 2.

    With several numbers, d > 1, and the error averaged over them:

    - f = −‖ŷ − y‖: a positive score says that the training example brings the prediction closer to the label;
    - L = f² / d;
    - Q = −2 f / d;
    - w = 2 / d; an example has the weight 2 in H, see `kernel_weight`.

    Batches ``(x, y)`` and mappings with ``"labels"`` are understood; for others override `get_predictions` and
    `get_labels`. To attribute one of several predictions, let both methods choose it.

    >>> import torch
    >>> class Regressor(RegressionMixin, torch.nn.Linear): ...
    >>> model = Regressor(2, 1, bias=False)
    >>> batch = torch.zeros(3, 2), torch.tensor([1.0, 2.0, -1.0])
    >>> model.out_to_loss_grad(batch), model.out_to_loss_curvature(batch)
    (tensor([ 2.,  4., -2.]), tensor([2., 2., 2.]))
    """

    whitens_by_default = False  # a single number has nothing to draw

    def get_predictions(self, batch: Any) -> Tensor:
        """Return the predictions for ``batch``, (b,) or (b, d)."""
        return forward(self, batch, "logits", hook="get_predictions")

    def get_labels(self, batch: Any) -> Tensor:
        """Return the numbers to predict, of the same shape as the predictions."""
        return labels(self, batch, hook="get_labels")

    def describe(self, batch: Any) -> dict[str, Tensor | list[str]]:
        """Return the ``"label"`` of every example, if it has one, and the ``"prediction"``, (b,).

        Several numbers of an example are text such as "0.5, 2".
        """
        predicted = _in_words(self.part_predictions(batch))
        if not has_labels(self, batch, "get_labels", RegressionMixin):
            return {"prediction": predicted}
        return {"label": _in_words(self.part_labels(batch)), "prediction": predicted}

    def part_predictions(self, batch: Any) -> Tensor:
        """Return the predictions, (b,) or (b, d)."""
        return _rows(self.get_predictions(batch), "get_predictions")

    def part_labels(self, batch: Any) -> Tensor:
        """Return the numbers to predict, (b,) or (b, d)."""
        return _rows(self.get_labels(batch), "get_labels")

    def part_losses(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Return the squared errors, (b,) or (b, d)."""
        return (predictions - labels).square()

    def model_output(self, batch: Any) -> Tensor:
        """Return the predictions, or minus their distances from the labels, (b,)."""
        predictions = self.part_predictions(batch)
        if predictions.ndim == 1:
            given = labels_or_none(batch)
            if isinstance(given, Tensor) and self.get_labels(batch).numel() != len(predictions):
                raise ValueError(
                    f"get_labels returned shape {tuple(self.get_labels(batch).shape)} for one prediction an example."
                    " Override get_labels(self, batch) too, to choose the label of the prediction that is attributed."
                )
            return predictions
        targets = self.part_labels(batch)
        if targets.shape != predictions.shape:
            raise ValueError(
                f"get_labels returned shape {tuple(targets.shape)} for predictions {tuple(predictions.shape)}. Override"
                " get_labels(self, batch), or get_predictions(self, batch) to choose or sum the outputs to attribute."
            )
        return -(predictions - targets).norm(dim=1)

    def draw_labels(self, batch: Any, seeds: Sequence[int]) -> Tensor | None:
        """Return a sign for every predicted number, (b, d); see `TRAKMixin` for ``seeds``.

        None for a single number: its output tells all.
        """
        labels = self.part_labels(batch)
        return None if labels.ndim == 1 else draw_signs(seeds, labels.shape[1:], labels)

    def drawn_loss(self, drawn: tuple[Any, Tensor]) -> Tensor:
        """Return √(2 / d) Σ s ŷ for every example, (b,), with signs s.

        On average, the outer product of its gradient is the Gauss–Newton matrix of the mean squared error.
        """
        batch, signs = drawn
        return (2 / signs.shape[1]) ** 0.5 * (signs * self.part_predictions(batch)).sum(1)

    def output_of_parts(self, losses: Tensor, batch: Any) -> Tensor:
        """Return minus the distances from the labels, (b,), of several numbers."""
        total = losses.sum(1)
        return -torch.where(total > 0, total, 1).sqrt() * (total > 0)  # the slope is zero at zero, as that of a norm

    def output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Return the squared errors, averaged over the numbers of an example, (b,)."""
        targets = self.part_labels(batch)
        if targets.ndim == 1:
            if targets.shape != output.shape:
                raise ValueError(
                    f"get_labels returned shape {tuple(targets.shape)} for predictions {tuple(output.shape)}. Override"
                    " get_labels(self, batch) to return one number for each example."
                )
            return self.part_losses(output, targets)
        return output.square() / targets.shape[1]


def _rows(value: Tensor, hook: str) -> Tensor:
    """Return one number for each example, (b,), or several, (b, d)."""
    if value.ndim == 2 and value.shape[1] == 1:
        value = value.squeeze(1)
    if value.ndim not in (1, 2):
        raise ValueError(
            f"{hook} returned shape {tuple(value.shape)}; expected one number for each example, (b,) or (b, 1), or"
            f" several, (b, d). Override {hook}(self, batch), e.g. with .flatten(1)."
        )
    return value


def _in_words(numbers: Tensor) -> Tensor | list[str]:
    """Return one number for each example as it is, (b,), and several as text, (b, d) → (b,)."""
    if numbers.ndim == 1:
        return numbers
    return [", ".join(f"{number:.4g}" for number in row) for row in numbers.tolist()]
