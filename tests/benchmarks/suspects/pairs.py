"""Pairs, with the data and models of the examples: captions of images, comparisons of images, and two sentences."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning as L
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from examples.clip import DIGITS, WORDS, CaptionedDigits, DigitsCLIP, tokenize
from examples.custom_task import Ranker, comparisons
from tests.benchmarks.quality.tasks import Classifier, Data, Task
from tests.benchmarks.suspects.cases import Case, Evaluated, last_inputs
from tests.benchmarks.suspects.planting import Faults, Fields, add_noise, noise, other_class

SENTENCES_LENGTH, N_SPECIAL = 48, 4  # tokens of both sentences; the first ids are for padding, unknown words and ends


def _captions_data() -> Data:
    source = CaptionedDigits(swapped=0)
    return Data(source.images, tokenize(source.captions), n_train=1000, n_targets=300, batch_size=64)


def other_captions(fields: Fields, rows: Tensor, generator: Generator) -> Fields:
    """Give images the captions of others, which name another digit."""
    images, right = fields
    captions, digits = right.clone(), torch.tensor([1 + WORDS.index(digit) for digit in DIGITS])
    named = (right[:, :, None] == digits).any(1).long().argmax(1)
    for row in rows.tolist():
        others = (named != named[row]).nonzero()[:, 0]
        captions[row] = right[others[torch.randint(len(others), (), generator=generator)]]
    return images, captions


def evaluate_captions(module: Any, fields: Fields) -> Evaluated:
    """Evaluate pairs of an image and a caption, each against all others."""
    logits, own = module.compare(fields), torch.arange(len(fields[0]))
    losses = sum(F.cross_entropy(one, own, reduction="none") for one in (logits, logits.T)) / 2
    return Evaluated(losses, torch.cat(module.get_embeddings(fields), 1))


def _comparisons_data() -> Data:
    return Data(*comparisons(1300, wrong=0).tensors, n_train=1000, n_targets=300, batch_size=50)


def the_wrong_way_round(fields: Fields, rows: Tensor, generator: Generator) -> Fields:
    """Exchange the two images of comparisons."""
    larger, smaller = (field.clone() for field in fields)
    larger[rows], smaller[rows] = fields[1][rows], fields[0][rows]
    return larger, smaller


def noise_in_both(copies: Fields, fields: Fields, generator: Generator) -> Fields:
    """Add a tenth of the standard deviation to both images."""
    return tuple(add_noise(one, of, generator) for one, of in zip(copies, fields, strict=True))


def evaluate_comparisons(module: Any, fields: Fields) -> Evaluated:
    """Evaluate comparisons, whose two images are embedded side by side."""
    embedded, outputs = last_inputs(module, lambda: module.model_output(fields))
    return Evaluated(F.softplus(-outputs), embedded)


class TwoSentences(nn.Module):
    """The small BERT of the example, which gets token ids, (b, length), and returns logits."""

    def __init__(self) -> None:
        from examples.bert_text_classification import small_bert

        super().__init__()
        self.bert = small_bert(4000, SENTENCES_LENGTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids, attention_mask=ids != 0).logits


def _sentences_data() -> Data:
    return Data(*_sentences(), n_train=1600, n_targets=200, batch_size=32)


@cache
def _sentences() -> tuple[Tensor, Tensor]:
    from examples.bert_text_classification import PairDataset, docstring_pairs, train_tokenizer

    pairs = docstring_pairs()
    tokenizer = train_tokenizer([text for first, second, _ in pairs for text in (first, second)])
    fields = PairDataset(pairs, tokenizer, SENTENCES_LENGTH).fields
    return fields["input_ids"], fields["labels"]


def _sentences_module() -> L.LightningModule:
    return Classifier(TwoSentences(), lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))


def other_words_in_sentences(copies: Fields, fields: Fields, generator: Generator) -> Fields:
    """Replace two words of the sentences."""
    x, y = copies[0].clone(), copies[1]
    for ids in x:
        words = (ids >= N_SPECIAL).nonzero()[:, 0]
        places = words[torch.randperm(len(words), generator=generator)[:2]]
        ids[places] = torch.randint(N_SPECIAL, int(fields[0].max()) + 1, (len(places),), generator=generator)
    return x, y


CASES = {
    "captions": Case(
        Task("digits and captions, CLIP", _captions_data, DigitsCLIP, epochs=20),
        Faults(other_captions, noise),
        evaluate_captions,
    ),
    "comparisons": Case(
        Task("comparisons of digits, MLP", _comparisons_data, Ranker, epochs=10),
        Faults(the_wrong_way_round, noise_in_both),
        evaluate_comparisons,
        n_inputs=2,
    ),
    "sentences": Case(
        Task("two sentences, BERT", _sentences_data, _sentences_module, epochs=6),
        Faults(other_class, other_words_in_sentences),
        has_classes=True,
        memorised=True,
    ),
}
