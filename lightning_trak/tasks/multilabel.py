"""Classification by several labels at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from lightning_trak.tasks.batch import has_labels, only_valid
from lightning_trak.tasks.draws import draw_tags
from lightning_trak.tasks.log_odds import log_odds
from lightning_trak.tasks.parts import PartsMixin


class MultilabelMixin(PartsMixin):
    """Classification by c labels, each present or absent, trained with the binary cross-entropy.

    With logits g = forward(x), labels y and p = Π_c sigmoid(± g_c), the joint probability of all labels:

    - f = log(p / (1 − p));
    - L = softplus(−f) / c = −(log p) / c, the binary cross-entropy, averaged over labels;
    - Q = (1 − p) / c;
    - w = p (1 − p) / c; in H an example has another weight, see `kernel_weight`.

    L is a function of f, so its gradient is exactly −Q ∇f. Where training sums over labels, set ``reduction = "sum"``:
    it leaves out the divisions by c. This is the log-odds of the paper (TRAK, arXiv 2303.14186, Section 3.3) for
    the joint labels.

    Batches ``(x, y)`` and mappings with ``"labels"`` are understood, with y of zeros and ones, (b, c); for others
    override `get_logits` and `get_labels`, (b, c) each.

    Attributes:
        reduction: over labels, ``"mean"`` or ``"sum"``.

    >>> class Tagger(MultilabelMixin, torch.nn.Linear): ...
    >>> model, batch = Tagger(4, 3), (torch.randn(2, 4), torch.tensor([[0, 1, 1], [1, 0, 0]]))
    >>> loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1].float())
    >>> torch.allclose(model.output_to_loss(model.model_output(batch), batch).mean(), loss)
    True
    """

    reduction: str = "mean"

    def describe(self, batch: Any) -> dict[str, list[str]]:
        """Return the numbers of the labels that are present as ``"label"``, and of those predicted as ``"prediction"``.

        They are text such as "0,3"; "none" if no label is present. Targets may have no labels.
        """
        predicted = _numbers_of(self.part_predictions(batch) > 0)
        if not has_labels(self, batch, "get_labels", MultilabelMixin):
            return {"prediction": predicted}
        return {"label": _numbers_of(self.part_labels(batch) > 0.5), "prediction": predicted}

    def part_losses(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross-entropy of every label, (b, c).

        Args:
            predictions: logits, (b, c).
            labels: zeros and ones, or numbers in between, (b, c).

        Raises:
            ValueError: if shapes differ, or a label is outside of 0 to 1.
        """
        if predictions.ndim != 2 or predictions.shape != labels.shape:
            raise ValueError(
                f"get_logits returned shape {tuple(predictions.shape)}, get_labels {tuple(labels.shape)}; expected"
                " (b, c) for both. Override them to say where logits and labels are."
            )
        labels = only_valid(
            labels.to(predictions),
            (labels >= 0) & (labels <= 1),
            "get_labels returned labels outside of 0 to 1, for which there is no binary cross-entropy. Override"
            " get_labels(self, batch). If -1 stands for labels that are not known, override model_output(self, batch)"
            " and output_to_loss(self, output, batch) to leave them out: log_odds of the sum over the others.",
        )
        return binary_cross_entropy_with_logits(predictions, labels, reduction="none")

    def output_of_parts(self, losses: Tensor, batch: Any) -> Tensor:
        """Return the log-odds of all labels together, (b,)."""
        return log_odds(losses.sum(1))

    def output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Return the binary cross-entropy of every example, (b,), reduced over its labels."""
        return softplus(-output) / self._divisor(batch)

    def kernel_weight(self, output: Tensor, batch: Any) -> Tensor:
        """Return the weight of every example in H, (b,): q / (1 − q) (1 − p)² / c, with q = p^{1/c}.

        It gives H the trace of the Gauss–Newton matrix of the labels' mean loss, if the gradients of the logits are
        orthogonal and of equal norm, and the labels equally certain. With many labels p vanishes, and so would w. For
        one label the weight is w.
        """
        mean = softplus(-output) / self.get_labels(batch).shape[1]  # −log q
        odds = 1 / torch.expm1(mean).clamp(min=torch.finfo(mean.dtype).tiny)
        return odds * (-output).sigmoid() ** 2 / self._divisor(batch)

    def draw_labels(self, batch: Any, seeds: Sequence[int]) -> Tensor:
        """Return labels of zeros and ones, drawn from the predictions, (b, c); see `TRAKMixin` for ``seeds``."""
        return draw_tags(self.part_predictions(batch), seeds)

    def drawn_loss(self, drawn: tuple[Any, Tensor]) -> Tensor:
        """Return the binary cross-entropies of drawn labels, summed and divided by √c, (b,); not for ``"sum"``.

        On average, the outer product of its gradient is the Fisher information of the loss.
        """
        batch, labels = drawn
        return self.part_losses(self.part_predictions(batch), labels).sum(1) / self._divisor(batch) ** 0.5

    def _divisor(self, batch: Any) -> int:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}.")
        return self.get_labels(batch).shape[1] if self.reduction == "mean" else 1


def _numbers_of(present: Tensor) -> list[str]:
    """Return the numbers of the labels of every example as text, (b, c) → (b,)."""
    return [",".join(str(number) for number in row.nonzero()[:, 0].tolist()) or "none" for row in present.cpu()]
