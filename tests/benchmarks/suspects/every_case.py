"""All cases of the benchmark."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.benchmarks.quality import TASKS
from tests.benchmarks.quality.tags import TAGS
from tests.benchmarks.quality.tasks import Data
from tests.benchmarks.suspects import masks, pairs
from tests.benchmarks.suspects.cases import Case
from tests.benchmarks.suspects.planting import (
    Faults,
    far_number,
    noise,
    other_class,
    other_words,
    other_words_of_own_label,
    shuffled_words,
    wrong_tag,
)


def _tags_data() -> Data:
    """Return the digits with their tags before some were made wrong."""
    data = TASKS["digits"].data()  # in the same order
    for one in (data.train_set, data.targets):
        x, digits = one.tensors
        tags = [[float(digit in having) for having in TAGS.values()] for digit in digits.tolist()]
        one.tensors = x, torch.tensor(tags)
    return data


_DIGITS = TASKS["digits"]
_CLASSES = Faults(other_class, noise)

CASES = {
    "digits": Case(_DIGITS, _CLASSES, has_classes=True),
    "noisy": Case(
        replace(TASKS["noisy"], name="digits, MLP", data=_DIGITS.data), _CLASSES, has_classes=True, memorised=True
    ),
    "cancer": Case(TASKS["cancer"], _CLASSES, has_classes=True),
    "docstrings": Case(TASKS["docstrings"], Faults(other_class, other_words), has_classes=True, memorised=True),
    "diabetes": Case(TASKS["diabetes"], Faults(far_number, noise)),
    "tags": Case(replace(TASKS["tags"], data=_tags_data), Faults(wrong_tag, noise)),
    "passages": Case(TASKS["passages"], Faults(shuffled_words, other_words_of_own_label)),
    **masks.CASES,
    **pairs.CASES,
}
