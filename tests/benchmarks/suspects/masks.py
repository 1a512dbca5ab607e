"""Segmentation: handwritten digits on a noisy canvas, and the class of every pixel."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lightning_trak import SegmentationMixin
from tests.benchmarks.quality.tasks import Data, Task
from tests.benchmarks.suspects.cases import Case
from tests.benchmarks.suspects.planting import Faults, Fields, noise

SIZE, INK, N_TRAIN, N_TARGETS = 12, 0.5, 1000, 200  # pixels a side; how dark a pixel of the digit is; images


class SmallUNet(nn.Module):
    """Fine features of each pixel, joined with those of half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.coarse = nn.Sequential(
            *(nn.MaxPool2d(2), nn.Conv2d(16, 48, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)),
        )
        self.head = nn.Sequential(nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 11, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        return self.head(torch.cat([fine, self.coarse(fine)], 1))


class Segmenter(SegmentationMixin, L.LightningModule):
    """A small U-Net, trained on the cross-entropy of every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SmallUNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Return what training minimises, (b,)."""
        return F.cross_entropy(prediction, y, reduction="none").mean((1, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self(x), y).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def _data() -> Data:
    """Each digit is somewhere on its canvas; its dark pixels have the class 1 + digit, all others 0."""
    source, generator = load_digits(), torch.Generator().manual_seed(0)
    n, images = N_TRAIN + N_TARGETS, torch.tensor(source.images / 16, dtype=torch.float32)
    x = 0.2 * torch.rand(n, SIZE, SIZE, generator=generator)
    y = torch.zeros(n, SIZE, SIZE, dtype=torch.long)
    corners = torch.randint(SIZE - 8 + 1, (n, 2), generator=generator).tolist()
    for row, (top, left) in enumerate(corners):
        place = row, slice(top, top + 8), slice(left, left + 8)
        x[place] += images[row]
        y[place] = (images[row] >= INK) * (1 + int(source.target[row]))
    return Data(x[:, None], y, N_TRAIN, N_TARGETS, batch_size=40)


def wrong_masks(fields: Fields, rows: Tensor, generator: Generator) -> Fields:
    """Give images masks that are of another class, or shifted by two to four pixels, or those of other images."""
    x, right = fields
    y = right.clone()
    for row in rows.tolist():
        kind = int(torch.randint(3, (), generator=generator))
        if kind == 0:
            digit = (right[row].max() - 1 + torch.randint(1, 10, (), generator=generator)) % 10
            y[row][right[row] > 0] = 1 + digit
        elif kind == 1:
            shift = int(torch.randint(2, 5, (), generator=generator))
            axis = int(torch.randint(2, (), generator=generator))
            y[row] = right[row].roll(shift, axis)
        else:
            others = (right != right[row]).flatten(1).any(1).nonzero()[:, 0]
            y[row] = right[others[torch.randint(len(others), (), generator=generator)]]
    return x, y


_TASK = Task("digits, masks", _data, Segmenter, epochs=25)
CASES = {"masks": Case(_TASK, Faults(wrong_masks, noise), has_classes=True)}
