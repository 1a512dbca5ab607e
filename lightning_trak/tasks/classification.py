"""Classification into one of two or more classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from lightning_trak.tasks.base import TRAKMixin
from lightning_trak.tasks.batch import forward, labels, labels_in_range, labels_or_none
from lightning_trak.tasks.draws import draw_classes


class ClassificationMixin(TRAKMixin):
    """Single-label classification, trained with cross-entropy.

    With logits g = forward(x) / temperature, label y and p = softmax(g)_y:

    - f = g_y − log Σ_{c≠y} exp(g_c), the log-odds of the label: log(p / (1 − p));
    - L = softplus(−f) = −log p, the cross-entropy;
    - Q = 1 − p;
    - w = p (1 − p).

    Variants:

    - a single logit, for two classes and labels 0 and 1: p = sigmoid(± g) and f = ± g;
    - ``class_weights``: L, Q and w are multiplied by the weight of the label;
    - ``label_smoothing`` ε and two classes: L = (1 − ε/2) softplus(−f) + (ε/2) softplus(f) and Q = 1 − ε/2 − p. With
      more classes the smoothed loss is no function of f. That is an error: define ``per_sample_loss``.

    With three classes or more, gradients are whitened by what f leaves open: which of the other classes it is. See
    ``TRAKCallback(preconditioner=...)``.

    TRAK, arXiv 2303.14186, Section 3.3. Batches ``(x, y)`` and mappings with ``"labels"`` (Hugging Face inputs, whose
    model returns ``.logits``) are understood; for others override `get_logits` and `get_labels`.

    A target without a label gets the class that the last checkpoint predicts. Where `model_output`, `get_logits` or
    `get_labels` is overridden, it gets the class that each checkpoint predicts.

    Attributes:
        temperature: divides the logits; 1 unless training divides them too.
        label_smoothing: ε, as in ``torch.nn.functional.cross_entropy``.
        class_weights: a weight for each class, (classes,), if training uses weights. ``cross_entropy`` also divides by
            their sum over the batch; Q does not.

    >>> class Classifier(ClassificationMixin, torch.nn.Linear): ...
    >>> model = Classifier(2, 3)
    >>> batch = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    >>> p = model(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]
    >>> torch.allclose(model.model_output(batch), torch.log(p / (1 - p)), atol=1e-5)
    True
    """

    temperature: float | Tensor  # no values here: a module may register buffers or parameters of these names
    class_weights: Tensor | None
    label_smoothing: float = 0.0
    draws_rest = True

    def get_logits(self, batch: Any) -> Tensor:
        """Return the logits, (b, classes), (b, 1) or (b,): ``self(x)``, or ``self(**inputs)`` for a mapping."""
        return forward(self, batch, "logits", hook="get_logits")

    def get_labels(self, batch: Any) -> Tensor | None:
        """Return the labels of ``batch``, (b,), integers; None if it has none, to take the predicted classes."""
        return None if labels_or_none(batch) is None else labels(self, batch, hook="get_labels")

    def label_targets(self, batch: Any) -> Any:
        """Return the batch; if it has no labels, with the predicted classes as labels."""
        names = ("model_output", "get_logits", "get_labels")
        if any(getattr(type(self), name) is not getattr(ClassificationMixin, name) for name in names):
            return batch  # overridden methods may not understand a batch of another form
        if labels_or_none(batch) is not None:
            return batch
        with torch.no_grad():
            classes = _two_at_least(self.get_logits(batch)).argmax(1)
        if isinstance(batch, Mapping):
            return {**batch, "labels": classes}
        return (batch[0] if isinstance(batch, (list, tuple)) else batch), classes

    def describe(self, batch: Any) -> dict[str, Tensor]:
        """Return the ``"label"`` of every example, if it has one, and the class of the ``"prediction"``, (b,)."""
        logits, classes = self._logits_and_classes(batch)
        known = {} if self.get_labels(batch) is None else {"label": classes}
        return {**known, "prediction": logits.argmax(1)}

    def model_output(self, batch: Any) -> Tensor:
        """Return the log-odds of every example's label, (b,)."""
        logits, classes = self._logits_and_classes(batch)
        if self.label_smoothing and logits.shape[1] > 2:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} with {logits.shape[1]} classes: the loss is no function of the"
                " log-odds of the label. Set label_smoothing = 0 in the module, and let per_sample_loss(self, batch)"
                " return the smoothed losses, (b,)."
            )
        others = _without(logits, classes)
        return logits.gather(1, classes[:, None]).squeeze(1) - others.logsumexp(1)

    def output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Return the cross-entropies, (b,)."""
        classes = self.get_labels(batch)
        if classes is None:
            classes = labels(self, batch, hook="get_labels")  # raises an error: no labels, no loss
        smoothed = self.label_smoothing / 2
        loss = (1 - smoothed) * softplus(-output)
        if smoothed:
            loss = loss + smoothed * softplus(output)
        weights = self._weights(output, classes)
        return loss if weights is None else loss * weights

    def draw_labels(self, batch: Any, seeds: Sequence[int]) -> Tensor | None:
        """Return another class than the label for every example, drawn from the predictions, (b,).

        None for two classes: there is one other class, and nothing to draw. See `TRAKMixin` for ``seeds``.
        """
        logits, classes = self._logits_and_classes(batch)
        if logits.shape[1] == 2:
            return None
        return draw_classes(_without(logits, classes), seeds)

    def drawn_loss(self, drawn: tuple[Any, Tensor]) -> Tensor:
        """Return −√(1 − p) log q for every example, (b,), with q the drawn class's share of all others' probability.

        By the chain rule, the Fisher information of the class is that of "the label or not", w ∇f ∇fᵀ, plus 1 − p times
        that of the other classes among themselves. On average, the outer product of this loss's gradient is the second.
        """
        batch, others = drawn
        logits, classes = self._logits_and_classes(batch)
        unlikely = -logits.detach().log_softmax(1).gather(1, classes[:, None]).squeeze(1).expm1()  # 1 − p
        losses = unlikely.clamp(min=0).sqrt() * cross_entropy(_without(logits, classes), others, reduction="none")
        weights = self._weights(losses, classes)
        return losses if weights is None else losses * weights.sqrt()

    def _logits_and_classes(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return logits divided by the temperature, (b, classes), and labels, or the predicted classes, (b,)."""
        logits, classes = self.get_logits(batch) / getattr(self, "temperature", 1), self.get_labels(batch)
        if _is_single(logits):
            logits, classes = _two_at_least(logits), None if classes is None else _binary(classes)
        if logits.ndim != 2:
            raise ValueError(
                f"get_logits returned shape {tuple(logits.shape)}; expected (b, classes), or (b,) for a single logit."
                " Override get_logits(self, batch), or define model_output(self, batch) for another task."
            )
        classes = logits.argmax(1) if classes is None else classes
        if classes.ndim != 1 or len(classes) != len(logits) or classes.dtype.is_floating_point:
            raise ValueError(
                f"get_labels returned shape {tuple(classes.shape)} and {classes.dtype}; expected {len(logits)} integer"
                " class labels, shape (b,). Override get_labels(self, batch), e.g. with .argmax(1) for one-hot labels."
            )
        return logits, classes.long()

    def reduce_losses(self, losses: Tensor, batch: Any) -> Tensor:
        """Return the mean; with ``class_weights``, the sum divided by the sum of weights, as ``cross_entropy`` does."""
        weights = self._weights(losses, self.get_labels(batch))
        return losses.mean() if weights is None else losses.sum() / weights.sum()

    def _weights(self, like: Tensor, classes: Tensor | None) -> Tensor | None:
        """Return the weight of every example's label, (b,)."""
        weights = getattr(self, "class_weights", None)
        if weights is None or classes is None:
            return None
        if self.label_smoothing:
            raise ValueError(
                "class_weights and label_smoothing together: the smoothed loss has a weight for each class, not for the"
                " label alone. Unset both in the module, and define per_sample_loss(self, batch) to return the losses,"
                " (b,)."
            )
        weights, classes = torch.as_tensor(weights).to(like), classes.reshape(len(like)).long()
        with labels_in_range(
            f"class_weights has shape {tuple(weights.shape)}, too few for the labels",
            "Give it one weight for each class, (classes,).",
        ):
            return weights[classes]


def _without(logits: Tensor, classes: Tensor) -> Tensor:
    """Return logits with −∞ in place of every example's own class, (b, classes)."""
    with labels_in_range(
        f"get_labels returned labels outside of 0 to {logits.shape[1] - 1}, the classes of get_logits",
        "Override get_labels(self, batch); it may return None for targets without labels.",
    ):
        return logits.scatter(1, classes[:, None], float("-inf"))


def _is_single(logits: Tensor) -> bool:
    return logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1)


def _two_at_least(logits: Tensor) -> Tensor:
    """Return a single logit as those of two classes, (b, 2), the first of them zero; other logits as they are."""
    if not _is_single(logits):
        return logits
    return torch.stack([torch.zeros_like(logits), logits], -1).reshape(len(logits), 2)


def _binary(classes: Tensor) -> Tensor:
    """Return the labels of a single logit as integers 0 and 1, (b,), from any dtype and (b,) or (b, 1)."""
    flat = classes.squeeze(1) if classes.ndim == 2 and classes.shape[1] == 1 else classes
    if not bool(((flat == 0) | (flat == 1)).all()):
        raise ValueError(
            "get_labels returned labels other than 0 and 1 for a single logit. Override get_labels(self, batch), or"
            " define output_to_loss(self, output, batch) for labels between 0 and 1."
        )
    return flat.long()
