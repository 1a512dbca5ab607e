"""Digits with several tags each, some of which are wrong."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_trak import MultilabelMixin
from tests.benchmarks.quality.tasks import Classifier, Data, Task, _digits

TAGS = {
    "even": {0, 2, 4, 6, 8},
    "prime": {2, 3, 5, 7},
    "greater than four": {5, 6, 7, 8, 9},
    "a multiple of three": {0, 3, 6, 9},
    "drawn with a loop": {0, 6, 8, 9},
    "drawn with straight lines": {1, 4, 7},
}


class Tagger(MultilabelMixin, Classifier):
    """A network trained on the binary cross-entropy."""

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Return what training minimises, (b,)."""
        return F.binary_cross_entropy_with_logits(prediction, y, reduction="none").mean(1)


def _data() -> Data:
    """One tag in twenty of the train set is wrong."""
    images, digits = _digits()
    tags = torch.tensor([[float(digit in having) for having in TAGS.values()] for digit in digits.tolist()])
    data = Data(images, tags, n_train=1000, n_targets=300, batch_size=50)
    given = data.train_set.tensors[1]
    wrong = torch.rand(given.shape, generator=torch.Generator().manual_seed(1)) < 0.05
    given[wrong] = 1 - given[wrong]
    return data


def _module() -> L.LightningModule:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, len(TAGS))
    )
    return Tagger(network, lambda parameters: torch.optim.Adam(parameters, lr=2e-3))


TASKS = {"tags": Task("digits, tags", _data, _module, epochs=25)}
