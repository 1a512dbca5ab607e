"""MONAI's U-Net for segmentation: tensors of a class of its own, and a loss of whole masks.

It stands for segmentation-models-pytorch and torchgeo, too: they need torchvision, and of that PyPI has no build that
loads beside the CPU build of torch.
"""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.losses import DiceCELoss, DiceLoss
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureTyped, ScaleIntensityd
from torch.nn import functional as F

from lightning_trak import SegmentationMixin, TRAKCallback, TRAKMixin, log_odds
from tests.third_party.training import ENGINES, Data, assert_same_training, auroc, fit

N, M, SIDE = 48, 6, 16
WRONG = range(0, N, 8)


def discs(n, seed, wrong=()):
    """Bright discs in noise and their masks; some have the mask of another image."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    centres, radii = draw.uniform(4, SIDE - 4, (n, 2)), draw.uniform(2.5, 4, n)
    distances = [np.hypot(x - cx, y - cy) for cx, cy in centres]
    masks = np.stack([distance < radius for distance, radius in zip(distances, radii, strict=True)])[:, None]
    images = masks + 0.3 * draw.normal(size=masks.shape)
    masks[list(wrong)] = np.roll(masks[list(wrong)], 1, axis=0)
    return [
        {"image": image.astype(np.float32), "label": mask.astype(np.float32)}
        for image, mask in zip(images, masks, strict=True)
    ]


@pytest.fixture(scope="module")
def data():
    transform = Compose([EnsureTyped(["image", "label"]), ScaleIntensityd("image")])
    train, targets = (Dataset(found, transform) for found in (discs(N, 0, WRONG), discs(M, 1)))
    return Data(DataLoader(train, batch_size=12, shuffle=True), DataLoader(targets, batch_size=M))


class Segmenter(L.LightningModule):
    """The pattern of MONAI's own tutorials: a network, a loss, and mappings with images and labels."""

    def __init__(self):
        super().__init__()
        self.net = UNet(2, 1, 1, channels=(4, 8), strides=(2,), num_res_units=1, norm="batch", dropout=0.1)

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch["image"]), batch["label"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch["image"]), batch["label"]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]


class OfPixels(SegmentationMixin, Segmenter):
    """Trained with the cross-entropy of every pixel."""

    def loss(self, logits, masks):
        return F.binary_cross_entropy_with_logits(logits, masks)

    def get_logits(self, batch):
        return self(batch["image"])

    def get_labels(self, batch):
        return batch["label"]


class OfMasks(TRAKMixin, Segmenter):
    """Trained with the sum of Dice loss and cross-entropy, no function of one number: its log-odds are attributed."""

    def loss(self, logits, masks):
        return DiceCELoss(sigmoid=True)(logits, masks)

    def model_output(self, batch):
        logits, masks = self(batch["image"]), batch["label"]
        losses = DiceLoss(sigmoid=True, reduction="none")(logits, masks)
        losses = losses + F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
        return log_odds(losses.flatten(1).mean(1))


MODULES = [OfPixels, OfMasks]


@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.parametrize("build", MODULES)
def test_training_is_the_same(tmp_path, data, build, gradients):
    assert_same_training(tmp_path, build, data, gradients, max_epochs=2)


@pytest.mark.parametrize("build", MODULES)
def test_wrong_masks_are_found(tmp_path, data, build):
    trainer = fit(tmp_path, build, data, TRAKCallback(featurize_on="fit_end"), max_epochs=10)
    assert auroc(trainer.attribute_self(), WRONG) > 0.9
    assert trainer.attribute(data).scores.shape == (N, M)
