"""Causal language modelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_trak.data.batch import describe
from lightning_trak.tasks.batch import forward, labels_or_none
from lightning_trak.tasks.parts import ClassifiedPartsMixin


class LanguageModelingMixin(ClassifiedPartsMixin):
    """Causal language modelling, trained with the cross-entropy of the next token.

    With p_t = softmax(g_{t−1})_{y_t} for token t, and p their geometric mean over the T tokens of a sequence that
    count:

    - f = log(p / (1 − p)), the log-odds of p;
    - L = softplus(−f) = −log p, the cross-entropy averaged over these tokens;
    - Q = 1 − p;
    - w = p (1 − p); a sequence has the weight T w in H, see `kernel_weight`.

    L is a function of f, so its gradient is exactly −Q ∇f. By default gradients are whitened by the curvature of all
    tokens' losses, see ``TRAKCallback(preconditioner=...)``; then H and w are not used.

    This is the log-odds of the paper (TRAK, arXiv 2303.14186, Section 3.3) for a sequence. Sequences count the same,
    however many tokens they have.

    These batches are understood; for others override `get_logits`, `get_labels` and `get_output_mask`:

    - mappings with ``"labels"``, as for Hugging Face models: the model is called without them, and shifts nothing;
    - mappings without: the labels are ``"input_ids"`` where ``"attention_mask"`` is not 0;
    - ``(tokens, labels)``, and tokens alone.

    A mapping may have a boolean ``"output_mask"``, (b, length): only the tokens where it is True count. So the output
    of a target can be that of a span, a completion for example.

    Attributes:
        ignore_index: the label of tokens that do not count.

    >>> import torch
    >>> class Bigram(LanguageModelingMixin, torch.nn.Embedding): ...
    >>> model, tokens = Bigram(5, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    >>> loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    >>> torch.allclose(model.output_to_loss(model.model_output(tokens), tokens).mean(), loss)
    True
    """

    _parts = _classes = "tokens"

    def get_logits(self, batch: Any) -> Tensor:
        """Return the logits of ``batch``, (b, length, vocabulary): at t for the token after t."""
        return forward(self, batch, "logits", hook="get_logits", leave_out=("labels", "output_mask"))

    def get_labels(self, batch: Any) -> Tensor:
        """Return the tokens, (b, length), not shifted; ``ignore_index`` where they do not count."""
        found = labels_or_none(batch)
        if found is None and isinstance(batch, Mapping) and "input_ids" in batch:
            mask = batch.get("attention_mask")
            tokens: Tensor = batch["input_ids"]
            return tokens if mask is None else tokens.masked_fill(mask == 0, self.ignore_index)
        if found is None:
            found = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
        if not isinstance(found, Tensor):
            raise TypeError(
                f"The batch is {describe(batch)}; expected tokens, (tokens, labels) or a mapping with 'input_ids'."
                f" Override get_labels(self, batch) in {type(self).__name__} to say where to find them."
            )
        return found

    def get_output_mask(self, batch: Any) -> Tensor | None:
        """Return which tokens count in the output, (b, length), boolean; None for all."""
        return batch.get("output_mask") if isinstance(batch, Mapping) else None

    def part_labels(self, batch: Any) -> Tensor:
        """Return the tokens, (b, length), not shifted; ``ignore_index`` outside of the output mask too."""
        tokens, mask = self.get_labels(batch), self.get_output_mask(batch)
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(
                f"get_output_mask returned shape {tuple(mask.shape)} for tokens {tuple(tokens.shape)}; expected the"
                " same. A mask says of every token, the first included, whether it counts."
            )
        return tokens if mask is None else tokens.masked_fill(~mask.bool(), self.ignore_index)

    def logits_and_classes(self, predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of every token but the first, (b, vocabulary, length − 1), and these tokens.

        Args:
            predictions: logits, (b, length, vocabulary).
            labels: tokens, (b, length), not shifted.

        Raises:
            ValueError: if shapes do not fit together.
        """
        if predictions.ndim != 3 or predictions.shape[:2] != labels.shape:
            raise ValueError(
                f"get_logits returned shape {tuple(predictions.shape)}, get_labels {tuple(labels.shape)}; expected (b,"
                " length, vocabulary) and (b, length). Override them to say where logits and tokens are."
            )
        if labels.is_floating_point():
            raise ValueError(
                f"get_labels returned {labels.dtype}; expected tokens, integers. Override get_labels(self, batch)."
            )
        return predictions[:, :-1].transpose(1, 2), labels[:, 1:]

    def count_parts(self, labels: Tensor) -> Tensor:
        """Return how many tokens of every sequence are predicted and count, (b,)."""
        return super().count_parts(labels[:, 1:])
