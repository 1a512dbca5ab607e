"""Causal language modelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_trak.data.batch import describe
from lightning_trak.tasks.base import TRAKMixin
from lightning_trak.tasks.batch import forward, labels_in_range, labels_or_none
from lightning_trak.tasks.log_odds import log_odds


class LanguageModelingMixin(TRAKMixin):
    """Causal language modelling, trained with the cross-entropy of the next token.

    With p_t = softmax(g_{t−1})_{y_t} for token t, and p their geometric mean over the tokens of a sequence that count:

    - f = log(p / (1 − p)), the margin of a token of the sequence;
    - L = softplus(−f) = −log p, the cross-entropy averaged over these tokens;
    - Q = 1 − p;
    - w = p (1 − p); in the kernel T w, for T tokens that count: the curvature of the mean of T losses, in trace, were
      their gradients orthogonal and alike.

    As L is a function of f, so is its gradient exactly −Q ∇f. The log-odds of the paper (TRAK, arXiv 2303.14186,
    Section 3.3) for a sequence. Where sequences have different numbers of tokens, each sequence counts the same.

    Understood are mappings with ``"labels"`` (Hugging Face inputs; the model is called without them and shifts
    nothing), mappings without, whose labels are ``"input_ids"`` where ``"attention_mask"`` is not 0, batches
    ``(tokens, labels)`` and tokens alone. A boolean ``"output_mask"``, (b, length), in a mapping leaves only the tokens
    where it is True: the output of a target is then that of a span, a completion for example. For other batches
    override `get_logits`, `get_labels` and `get_output_mask`.

    Attributes:
        ignore_index: the label of tokens that do not count.

    >>> import torch
    >>> class Bigram(LanguageModelingMixin, torch.nn.Embedding): ...
    >>> model, tokens = Bigram(5, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    >>> loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    >>> torch.allclose(model.output_to_loss(model.model_output(tokens), tokens).mean(), loss)
    True
    """

    ignore_index: int = -100

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
        """Return which tokens the output is of, (b, length), boolean; None for all."""
        return batch.get("output_mask") if isinstance(batch, Mapping) else None

    def model_output(self, batch: Any) -> Tensor:
        """Return the log-odds of the tokens of a sequence, (b,)."""
        logits, tokens = self.get_logits(batch), self._masked_labels(batch)
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"get_logits returned shape {tuple(logits.shape)}, get_labels {tuple(tokens.shape)}; expected (b,"
                " length, vocabulary) and (b, length). Override them to say where logits and tokens are."
            )
        next_tokens, predicted = tokens[:, 1:], logits[:, :-1].transpose(1, 2)
        if next_tokens.is_floating_point():
            raise ValueError(
                f"get_labels returned {next_tokens.dtype}; expected tokens, integers. Override get_labels(self, batch)."
            )
        with labels_in_range(
            f"get_labels returned tokens outside of 0 to {logits.shape[2] - 1}, those of get_logits",
            f"Set ignore_index, which is {self.ignore_index}, to the label of tokens that do not count.",
        ):
            losses = cross_entropy(predicted, next_tokens.long(), ignore_index=self.ignore_index, reduction="none")
        return log_odds(losses.sum(1) / self._counted(tokens).clamp(min=1))

    def kernel_weight(self, output: Tensor, batch: Any) -> Tensor:
        """Return the examples' weights in the kernel, (b,)."""
        return self._counted(self._masked_labels(batch)) * super().kernel_weight(output, batch)

    def reduce_losses(self, losses: Tensor, batch: Any) -> Tensor:
        """Return the mean over all tokens of a batch that count."""
        counted = self._counted(self._masked_labels(batch))
        return (losses * counted).sum() / counted.sum()

    def _masked_labels(self, batch: Any) -> Tensor:
        """Return the tokens, (b, length), those outside of the output mask left out."""
        tokens, mask = self.get_labels(batch), self.get_output_mask(batch)
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(
                f"get_output_mask returned shape {tuple(mask.shape)} for tokens {tuple(tokens.shape)}; expected the"
                " same. A mask says of every token, the first too, whether the output is of it."
            )
        return tokens if mask is None else tokens.masked_fill(~mask.bool(), self.ignore_index)

    def _counted(self, tokens: Tensor) -> Tensor:
        """Return how many tokens of every sequence are predicted and count, (b,)."""
        return (tokens[:, 1:] != self.ignore_index).sum(1)
