"""Classification of every pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_trak.tasks.base import TRAKMixin
from lightning_trak.tasks.batch import forward, labels, labels_in_range, only_valid
from lightning_trak.tasks.log_odds import log_odds


class SegmentationMixin(TRAKMixin):
    """Semantic segmentation, trained with the cross-entropy of every pixel.

    With p_i = softmax(g_i)_{y_i} at pixel i, and p = (Π_i p_i)^{1 / pixels}, their geometric mean over labelled pixels:

    - f = log(p / (1 − p)), the margins of all pixels as one;
    - L = softplus(−f) = −log p, the cross-entropy averaged over the labelled pixels of an image;
    - Q = 1 − p;
    - w = p (1 − p); in the kernel N w, for N labelled pixels: the curvature of the mean of N losses, in trace, were
      their gradients orthogonal and alike.

    As L is a function of f, so is its gradient exactly −Q ∇f. The log-odds of the paper (TRAK, arXiv 2303.14186,
    Section 3.3) for an image. Where images have different numbers of labelled pixels, each image counts the same.

    With a single logit, for two classes and labels 0 and 1, it stands against zero. Token classification is the same
    with one spatial axis: let `get_logits` return them as (b, classes, length).

    Batches ``(x, y)`` and mappings with ``"labels"`` are understood; for others override `get_logits` and `get_labels`.
    The forward may return ``.logits``, or a mapping with ``"out"`` as torchvision's models do.

    Attributes:
        ignore_index: the label of pixels that do not count.

    >>> class Segmenter(SegmentationMixin, torch.nn.Conv2d): ...
    >>> model = Segmenter(3, 4, 1)
    >>> batch = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))
    >>> loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> torch.allclose(model.output_to_loss(model.model_output(batch), batch).mean(), loss)
    True
    """

    ignore_index: int = -100

    def get_logits(self, batch: Any) -> Tensor:
        """Return the logits of ``batch``, (b, classes, ...) or (b, 1, ...), with any number of spatial axes."""
        return forward(self, batch, "logits", "out", hook="get_logits")

    def get_labels(self, batch: Any) -> Tensor:
        """Return the class of every pixel, (b, ...), integers."""
        return labels(self, batch, hook="get_labels")

    def model_output(self, batch: Any) -> Tensor:
        """Return the log-odds of all labelled pixels of an image, (b,)."""
        logits, classes = self.get_logits(batch), self.get_labels(batch)
        if logits.ndim >= 3 and logits.shape[1] == 1:  # against a logit of zero
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
            classes = classes.squeeze(1) if classes.ndim == logits.ndim else classes
        if logits.ndim < 3 or logits.shape[:1] + logits.shape[2:] != classes.shape:
            raise ValueError(
                f"get_logits returned shape {tuple(logits.shape)}, get_labels {tuple(classes.shape)}; expected (b,"
                " classes, height, width) and (b, height, width). Override them to say where logits and labels are."
            )
        if classes.is_floating_point():
            classes = only_valid(
                classes,
                classes == classes.round(),
                "get_labels returned classes that are no whole numbers, as of a mask that was scaled to 0 to 1."
                " Override get_labels(self, batch) to return them as integers.",
            )
        with labels_in_range(
            f"get_labels returned classes outside of 0 to {logits.shape[1] - 1}, those of get_logits",
            f"Set ignore_index, which is {self.ignore_index}, to the label of pixels that do not count.",
        ):
            losses = cross_entropy(logits, classes.long(), ignore_index=self.ignore_index, reduction="none").flatten(1)
        return log_odds(losses.sum(1) / self._counted(classes).clamp(min=1))

    def kernel_weight(self, output: Tensor, batch: Any) -> Tensor:
        """Return the examples' weights in the kernel, (b,)."""
        return self._counted(self.get_labels(batch)) * super().kernel_weight(output, batch)

    def reduce_losses(self, losses: Tensor, batch: Any) -> Tensor:
        """Return the mean over all labelled pixels of a batch."""
        counted = self._counted(self.get_labels(batch))
        return (losses * counted).sum() / counted.sum()

    def _counted(self, classes: Tensor) -> Tensor:
        """Return how many pixels of every image count, (b,)."""
        return (classes != self.ignore_index).flatten(1).sum(1)
