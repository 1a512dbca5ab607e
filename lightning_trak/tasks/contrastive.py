"""Contrastive learning of pairs, as in CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, pad, softplus

from lightning_trak.data.batch import describe
from lightning_trak.data.identity import digest_of
from lightning_trak.isolation.random_states import kept_random_states, seed_all
from lightning_trak.tasks.base import TRAKMixin
from lightning_trak.tasks.batch import call_forward, read_batches
from lightning_trak.tasks.draws import draw_classes


class ContrastiveMixin(TRAKMixin):
    """Contrastive learning of pairs, such as an image u and a text v, trained with the symmetric loss of CLIP.

    In training, the loss of a pair depends on the rest of its batch. Here a fixed contrast set replaces the batch: M
    random pairs of the train set, (u_j, v_j), embedded once per checkpoint. With embeddings of norm 1 and logit scale
    s:

    - m₁ = −log Σ_j exp(s u·v_j − s u·v), the log-odds of the text given the image;
    - m₂ = −log Σ_j exp(s u_j·v − s u·v), the log-odds of the image given the text;
    - f = m₁ + m₂;
    - L = (softplus(−m₁) + softplus(−m₂)) / 2, as a function of f with m₁ − m₂ held fixed;
    - Q = (2 − p₁ − p₂) / 4, with p = sigmoid(m);
    - w = (p₁ (1 − p₁) + p₂ (1 − p₂)) / 8.

    A pair that is in the contrast set itself is left out of its own sums:

    - A training example is recognised by its row number, never by its embeddings or content. A duplicate in another row
      counts as another pair, as it does in training.
    - A target is recognised by its data: it is the first pair of the contrast set with equal data, if there is one.
    - Where rows are unknown, nothing is left out: for a batch that you pass to ``model_output`` yourself, and with
      pairs from elsewhere in `get_contrast_batch`.

    TRAK, arXiv 2303.14186, Section 5.1. A model is understood if it returns ``.image_embeds`` and ``.text_embeds`` and
    has a parameter ``logit_scale``, as ``CLIPModel`` of Hugging Face; for others override `get_embeddings` and
    `get_logit_scale`.

    Attributes:
        contrast_size: M.
        contrast_seed: the seed of the draw of the contrast set.

    >>> class Pairs(ContrastiveMixin, torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.image, self.text = torch.nn.Linear(4, 2), torch.nn.Linear(3, 2)
    ...         self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
    ...     def get_embeddings(self, batch):
    ...         return self.image(batch[0]), self.text(batch[1])
    ...     def get_contrast_batch(self):
    ...         return torch.randn(8, 4), torch.randn(8, 3)
    >>> model = Pairs()
    >>> model.prepare_checkpoint()
    >>> model.model_output((torch.randn(5, 4), torch.randn(5, 3))).shape
    torch.Size([5])
    """

    whitens_by_default = False  # not measured yet

    contrast_size: int = 300
    contrast_seed: int = 0
    _members: _Members | None = None  # None: the contrast set is not from the train set

    def get_embeddings(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both halves of every pair, (b, d) each, of any norm."""
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"The batch is {describe(batch)}; expected a mapping that forward takes. Override"
                f" get_embeddings(self, batch) in {type(self).__name__} to return the embeddings of both halves."
            )
        inputs = {key: batch[key] for key in batch if key not in ("labels", "return_loss")}
        result = call_forward(self, batch, "get_embeddings", **inputs)
        if not (hasattr(result, "image_embeds") and hasattr(result, "text_embeds")):
            raise TypeError(
                f"{type(self).__name__}.forward returned {describe(result)}; expected an object with .image_embeds and"
                " .text_embeds. Override get_embeddings(self, batch) to return the embeddings of both halves."
            )
        return result.image_embeds, result.text_embeds

    def get_logit_scale(self) -> Tensor | float:
        """Return s, which multiplies the products of embeddings: ``self.logit_scale.exp()``."""
        scale = getattr(self, "logit_scale", None)
        if not isinstance(scale, Tensor):
            raise TypeError(
                f"{type(self).__name__} has no parameter logit_scale. Override get_logit_scale(self) to return the"
                " number that multiplies the products of embeddings."
            )
        return scale.exp()

    def get_contrast_batch(self) -> Any:
        """Return the contrast set: ``contrast_size`` random examples of the train set.

        Override it for pairs from elsewhere. Then no example counts as one of them.
        """
        try:
            loader = self.find_train_loader()  # type: ignore[attr-defined]  # set while prepare_checkpoint runs
        except Exception as error:
            raise TypeError(
                f"{type(self).__name__} needs training examples for its contrast set, and there are none: {error}"
                " For pairs from elsewhere, override get_contrast_batch(self)."
            ) from error
        order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(self.contrast_seed))
        rows, trainer = order[: self.contrast_size].tolist(), self.trainer  # type: ignore[attr-defined]
        self._members = _Members(loader.dataset, rows)
        with kept_random_states():
            seed_all(self.contrast_seed)
            return next(read_batches(trainer, self, loader, rows, len(rows), num_workers=0))[1]

    def prepare_checkpoint(self) -> None:
        """Embed the contrast set."""
        self._members = None
        with torch.no_grad():
            self._contrast = self._directions(self.get_contrast_batch())
        if self._members is not None and len(self._members) != len(self._contrast[0]):
            raise ValueError(
                f"get_contrast_batch() returned {len(self._contrast[0])} of the {len(self._members)} pairs that"
                " were drawn, so their rows are unknown. Set contrast_size, or choose pairs without super()."
            )

    def number_examples(self, rows: Sequence[int], dataset: Any | None = None) -> Tensor:
        """Return the place of each example in the contrast set, (b,); −1 for those that are not in it."""
        places = [-1] * len(rows) if self._members is None else self._members.places(rows, dataset)
        return torch.tensor(places, device=self._embedded()[0].device)

    def model_output(self, batch: Any) -> Tensor:
        """Return m₁ + m₂, (b,)."""
        first, second = self._margins(batch)
        return first + second

    def output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Return the loss of every pair against the contrast set, (b,)."""
        with torch.no_grad():
            first, second = self._margins(batch)
        half = (first - second) / 2
        return (softplus(-output / 2 - half) + softplus(-output / 2 + half)) / 2

    def draw_labels(self, batch: Any, seeds: Sequence[int]) -> Tensor:
        """Return the text that belongs to each image, and the image to each text, (b, 2), drawn from the predictions.

        0 is the pair itself, j the j-th pair of the contrast set. See `TRAKMixin` for ``seeds``.
        """
        return draw_classes(torch.stack(self._choices(batch), 1), seeds)

    def drawn_loss(self, drawn: tuple[Any, Tensor]) -> Tensor:
        """Return the cross-entropies of a drawn text and a drawn image, summed and divided by √2, (b,).

        On average, the outer product of its gradient is the Gauss–Newton matrix of the loss of a pair.
        """
        batch, labels = drawn
        pairs = zip(self._choices(batch), labels.unbind(1), strict=True)
        losses = [cross_entropy(logits, own, reduction="none") for logits, own in pairs]
        return (losses[0] + losses[1]) / 2**0.5

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the loss that CLIP minimises: each pair of the batch against the others."""
        images, texts = self._directions(batch)
        logits, pairs = self.get_logit_scale() * images @ texts.T, torch.arange(len(images), device=images.device)
        return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2

    def _directions(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both halves, (b, d) each, of norm 1."""
        pair = self.get_embeddings(batch)
        if not _are_embeddings(pair):
            raise TypeError(
                f"{type(self).__name__}.get_embeddings(batch) returned {describe(pair)}; expected two tensors, (b, d)"
                " each: the embeddings of both halves of every pair. Let get_embeddings return these two alone."
            )
        images, texts = pair
        return normalize(images, dim=1), normalize(texts, dim=1)

    def _embedded(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both halves of the contrast set, (M, d) each."""
        if not hasattr(self, "_contrast"):
            raise RuntimeError("Call prepare_checkpoint() before model_output: it embeds the contrast set.")
        return self._contrast

    def _margins(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return m₁ and m₂, (b,) each."""
        first, second = self._choices(batch)
        return -first[:, 1:].logsumexp(1), -second[:, 1:].logsumexp(1)

    def _choices(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return logits of the texts given the image, and of the images given the text, (b, 1 + M) each.

        The first is the pair itself, whose logit is zero.
        """
        images, texts = self._directions(batch)
        other_images, other_texts = self._embedded()
        scale, own = self.get_logit_scale(), (images * texts).sum(1, keepdim=True)
        to_texts, to_images = images @ other_texts.T, texts @ other_images.T
        first, second = scale * (to_texts - own), scale * (to_images - own)
        if self.example_numbers is not None:
            itself = self.example_numbers[:, None] == torch.arange(len(other_texts), device=own.device)
            first, second = (terms.masked_fill(itself, -torch.inf) for terms in (first, second))
        return pad(first, (1, 0)), pad(second, (1, 0))


class _Members:
    """Finds the place of an example in the contrast set, whose pairs are these rows of the train set, in order."""

    def __init__(self, dataset: Any, rows: Sequence[int]) -> None:
        self._dataset, self._rows = dataset, rows
        self._place_of_row = {row: place for place, row in enumerate(rows)}
        self._found: dict[tuple[int, int], int] = {}  # the same targets are asked for at every checkpoint

    def __len__(self) -> int:
        return len(self._rows)

    def places(self, rows: Sequence[int], dataset: Any | None) -> list[int]:
        """Return the place of each example in the contrast set; −1 for those that are not in it."""
        if dataset is None or dataset is self._dataset:
            return [self._place_of_row.get(row, -1) for row in rows]
        with kept_random_states():
            return [self._place_of_copy(dataset, row) for row in rows]

    def _place_of_copy(self, dataset: Any, row: int) -> int:
        key = (id(dataset), row)
        if key not in self._found:
            content = digest_of(dataset, row)
            self._found[key] = -1 if content is None else self._place_of_content.get(content, -1)
        return self._found[key]

    @cached_property
    def _place_of_content(self) -> dict[bytes | None, int]:
        """A place for each digest of data: that of the first pair with these data."""
        places: dict[bytes | None, int] = {}
        for place, row in enumerate(self._rows):
            places.setdefault(digest_of(self._dataset, row), place)
        return places


def _are_embeddings(pair: Any) -> bool:
    """Whether these are two tensors of the same shape, (b, d)."""
    halves = list(pair) if isinstance(pair, (tuple, list)) else []
    if len(halves) != 2 or not all(isinstance(half, Tensor) and half.ndim == 2 for half in halves):
        return False
    return bool(halves[0].shape == halves[1].shape)
