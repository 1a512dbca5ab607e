"""Ready mixins for common tasks: each says f, L, Q and w."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_trak.gradients.batch import describe
from lightning_trak.module import TRAKMixin


class ClassificationMixin(TRAKMixin):
    """Single-label classification into two or more classes, trained with cross-entropy.

    With logits g = forward(x) / temperature, label y and p = softmax(g)_y:

    - f = g_y − log Σ_{c≠y} exp(g_c), the log-odds of the label: log(p / (1 − p));
    - L = softplus(−f) = −log p, the cross-entropy;
    - Q = 1 − p;
    - w = p (1 − p).

    TRAK, arXiv 2303.14186, Section 3.3. Batches ``(x, y)`` and mappings with ``"labels"`` (Hugging Face inputs, whose
    model returns ``.logits``) are understood; for others override `get_logits` and `get_labels`.

    Attributes:
        temperature: divides the logits; 1 unless training does the same.

    >>> import torch
    >>> class Classifier(ClassificationMixin, torch.nn.Linear): ...
    >>> model = Classifier(2, 3)
    >>> batch = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    >>> p = model(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]
    >>> torch.allclose(model.model_output(batch), torch.log(p / (1 - p)), atol=1e-5)
    True
    """

    temperature: float = 1.0

    def get_logits(self, batch: Any) -> Tensor:
        """Return the logits of ``batch``, (b, classes): ``self(x)``, or ``self(**inputs)`` for a mapping."""
        return _forward(self, batch, "logits", hook="get_logits")

    def get_labels(self, batch: Any) -> Tensor:
        """Return the labels of ``batch``, (b,), integers."""
        return _second(batch, "labels", hook="get_labels")

    def model_output(self, batch: Any) -> Tensor:
        """Return the log-odds of every example's label, (b,)."""
        logits, labels = self.get_logits(batch), self.get_labels(batch)
        _check_classification(logits, labels)
        logits, labels = logits / self.temperature, labels[:, None]
        others = logits.scatter(1, labels, float("-inf"))
        return logits.gather(1, labels).squeeze(1) - others.logsumexp(1)


class RegressionMixin(TRAKMixin):
    """Regression on one number, trained with the squared error.

    With prediction ŷ = forward(x) and target y:

    - f = ŷ: a positive score says that the training example raises the prediction, right or wrong;
    - L = (f − y)²;
    - Q = 2 (y − f);
    - w = 2.

    Batches ``(x, y)`` and mappings with ``"labels"`` are understood; for others override `get_predictions` and
    `get_labels`.

    >>> import torch
    >>> class Regressor(RegressionMixin, torch.nn.Linear): ...
    >>> model = Regressor(2, 1, bias=False)
    >>> batch = torch.zeros(3, 2), torch.tensor([1.0, 2.0, -1.0])
    >>> model.out_to_loss_grad(batch), model.out_to_loss_curvature(batch)
    (tensor([ 2.,  4., -2.]), tensor([2., 2., 2.]))
    """

    def get_predictions(self, batch: Any) -> Tensor:
        """Return the predictions for ``batch``, (b,) or (b, 1)."""
        return _forward(self, batch, "logits", hook="get_predictions")

    def get_labels(self, batch: Any) -> Tensor:
        """Return the numbers to predict, (b,) or (b, 1)."""
        return _second(batch, "labels", hook="get_labels")

    def model_output(self, batch: Any) -> Tensor:
        """Return the predictions, (b,)."""
        return _one_number(self.get_predictions(batch), "get_predictions")

    def output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Return the squared errors, (b,)."""
        return (output - _one_number(self.get_labels(batch), "get_labels")).square()


def _forward(module: Any, batch: Any, field: str, *, hook: str) -> Tensor:
    """Run a module's forward on the inputs of a batch, and take a tensor from what it returns."""
    if isinstance(batch, Mapping):
        result = module(**{key: value for key, value in batch.items() if key != "labels"})
    elif isinstance(batch, (list, tuple)) and len(batch) >= 2:
        result = module(batch[0])
    else:
        raise _wrong_form(module, batch, hook)
    if isinstance(result, Mapping) and field in result:
        result = result[field]
    result = getattr(result, field, result)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"{type(module).__name__}.forward returned {describe(result)}; expected a tensor or an object with"
            f" .{field}. Override {hook}(self, batch)."
        )
    return result


def _second(batch: Any, field: str, *, hook: str) -> Tensor:
    """Take the labels out of a batch."""
    value = None
    if isinstance(batch, Mapping):
        value = batch.get(field)
    elif isinstance(batch, (list, tuple)) and len(batch) >= 2:
        value = batch[1]
    if not isinstance(value, Tensor):
        raise _wrong_form(None, batch, hook)
    return value


def _wrong_form(module: Any, batch: Any, hook: str) -> TypeError:
    where = "" if module is None else f" in {type(module).__name__}"
    return TypeError(
        f"The batch is {describe(batch)}; expected (inputs, labels) or a mapping with 'labels'. Override"
        f" {hook}(self, batch){where} to say where to find them."
    )


def _check_classification(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"get_logits returned shape {tuple(logits.shape)}; expected (b, classes) with at least two classes."
            " Override get_logits(self, batch), or define model_output(self, batch) for another task."
        )
    if labels.ndim != 1 or len(labels) != len(logits) or labels.dtype.is_floating_point:
        raise ValueError(
            f"get_labels returned shape {tuple(labels.shape)} and {labels.dtype}; expected {len(logits)} integer class"
            " labels, shape (b,). Override get_labels(self, batch), e.g. with .argmax(1) for one-hot labels."
        )


def _one_number(value: Tensor, hook: str) -> Tensor:
    if value.ndim == 2 and value.shape[1] == 1:
        value = value.squeeze(1)
    if value.ndim != 1:
        raise ValueError(
            f"{hook} returned shape {tuple(value.shape)}; expected one number for each example, (b,) or (b, 1)."
            f" Override {hook}(self, batch) to choose or sum the outputs to attribute."
        )
    return value
