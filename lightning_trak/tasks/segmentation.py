"""Classification of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_trak.tasks.batch import only_valid
from lightning_trak.tasks.parts import ClassifiedPartsMixin


class SegmentationMixin(ClassifiedPartsMixin):
    """Semantic segmentation, trained with the cross-entropy of every pixel.

    With p_i = softmax(g_i)_{y_i} at pixel i, and p = (Π_i p_i)^{1 / N}, their geometric mean over the N labelled pixels
    of an image:

    - f = log(p / (1 − p)), the log-odds of p;
    - L = softplus(−f) = −log p, the cross-entropy averaged over the labelled pixels of an image;
    - Q = 1 − p;
    - w = p (1 − p); an image has the weight N w in H, see `kernel_weight`.

    L is a function of f, so its gradient is exactly −Q ∇f. This is the log-odds of the paper (TRAK, arXiv 2303.14186,
    Section 3.3) for an image. Images count the same, however many labelled pixels they have.

    A single logit means two classes, labels 0 and 1: it is the logit of class 1, and that of class 0 is zero. Token
    classification is the same with one spatial axis: let `get_logits` return (b, classes, length).

    Batches ``(x, y)`` and mappings with ``"labels"`` are understood; for others override `get_logits`, (b, classes,
    ...), and `get_labels`, (b, ...).
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

    _parts = "pixels"

    def logits_and_classes(self, predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of every pixel, (b, classes, ...), and its class, (b, ...).

        Args:
            predictions: logits, (b, classes, ...) or (b, 1, ...), with any number of spatial axes.
            labels: the class of every pixel, (b, ...), or (b, 1, ...) for a single logit.

        Raises:
            ValueError: if shapes do not fit together.
        """
        logits, classes = predictions, labels
        if logits.ndim >= 3 and logits.shape[1] == 1:  # class 0 has the logit zero
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
                "get_labels returned classes that are no whole numbers, like those of a mask scaled to 0 to 1."
                " Override get_labels(self, batch) to return them as integers.",
            )
        return logits, classes
