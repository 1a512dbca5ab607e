"""Do scores predict retraining of a diffusion model? Against similarity of the pictures, which knows nothing of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_trak import DiffusionMixin, TRAKCallback, evaluate, retrain_subsets
from tests.benchmarks.measuring import print_table, trainer
from tests.benchmarks.quality.tasks import Data, _digits

STEPS, WIDTH, DRAWS = 100, 128, 4
EPOCHS, CHECKPOINTS = 120, 10
WIDTHS = (0.8, 1.0, 1.2, 1.5, 2.5)  # of the Gaussian kernel; the best is taken


class Network(nn.Module):
    """A residual MLP over pixels, conditioned on step and digit."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.first = nn.Embedding(10, 32), nn.Linear(64, WIDTH)
        self.conditions = nn.ModuleList(nn.Linear(64, WIDTH) for _ in range(2))
        self.middle, self.last = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)), nn.Linear(WIDTH, 64)
        self.register_buffer("frequencies", torch.exp(-math.log(1000) * torch.arange(16) / 16), persistent=False)

    def forward(self, noisy: Tensor, steps: Tensor, digits: Tensor) -> Tensor:
        angles = steps[:, None] * self.frequencies
        condition = torch.cat([angles.sin(), angles.cos(), self.classes(digits)], 1)
        x = F.silu(self.first(noisy.flatten(1)) + self.conditions[0](condition))
        x = x + F.silu(self.middle[0](x) + self.conditions[1](condition))
        x = x + F.silu(self.middle[1](x))
        return self.last(x).reshape(noisy.shape)


class Diffusion(DiffusionMixin, L.LightningModule):
    """DDPM with a cosine schedule; several draws of step and noise for each example and training step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()
        angles = (torch.arange(STEPS + 1) / STEPS + 0.008) / 1.008 * math.pi / 2
        shares = (angles[1:].cos() / angles[0].cos()) ** 2
        self.register_buffer("alphas_cumprod", shares.clamp(min=1e-4), persistent=False)

    def predict_noise(self, noisy: Tensor, steps: Tensor, batch: Any) -> Tensor:
        return self.network(noisy, steps, batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, digits = (part.repeat_interleave(DRAWS, 0) for part in batch)
        steps, noise = torch.randint(STEPS, (len(images),)), torch.randn_like(images)
        return F.mse_loss(self.predict_noise(self.add_noise(images, noise, steps), steps, (images, digits)), noise)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, EPOCHS)
        return [optimizer], [schedule]


class Retrained(Diffusion):
    """The output that retraining changes: minus the loss, over other pairs than those that are attributed."""

    n_pairs, pair_seed = 20, 1234

    def model_output(self, batch: Any) -> Tensor:
        return -super().model_output(batch).square()


def digits_data() -> Data:
    """Digits, their pixels from −1 to 1."""
    images, digits = _digits()
    return Data(2 * images - 1, digits, n_train=600, n_targets=150, batch_size=50)


def run(
    n_subsets: int = 60, repeats: int = 2, root: Path = Path(".benchmarks/diffusion"), epochs: int = EPOCHS
) -> None:
    """Print the table; trainings are kept in ``root``."""
    rows = _rows(n_subsets, repeats, root / f"{epochs}", epochs)
    note = (
        "In brackets half the width of the bootstrap confidence interval of 95 %. The width of the Gaussian kernel is"
        " the one with the highest LDS."
    )
    header = ["scores", "LDS", "slope"]
    print_table(f"Diffusion on digits, {n_subsets} random halves × {repeats}", header, rows, note)


def _rows(n_subsets: int, repeats: int, root: Path, epochs: int) -> Iterator[list[str]]:
    data, quiet = digits_data(), {"accelerator": "cpu", "max_epochs": epochs}
    truth = retrain_subsets(
        Retrained, data, lambda: trainer(root, **quiet, enable_checkpointing=False), n_subsets, repeats=repeats,
        dirpath=root / "truth",
    )  # fmt: skip
    files = sorted((root / "run").glob("*.ckpt"))
    if not files:
        L.seed_everything(0, verbose=False)
        every = max(1, epochs // CHECKPOINTS)
        saving = ModelCheckpoint(root / "run", save_top_k=-1, filename="{epoch:03d}", every_n_epochs=every)
        trainer(root, saving, **quiet).fit(Diffusion(), datamodule=data)
        files = sorted((root / "run").glob("*.ckpt"))
    for name, chosen in (("ours, last checkpoint", files[-1:]), (f"ours, {len(files)} checkpoints", files)):
        own = trainer(root, TRAKCallback(root / "trak"), accelerator="cpu")
        yield _row(name, own.attribute(Diffusion(), datamodule=data, ckpt_path=chosen).scores, truth)
    train, targets = (examples.tensors[0].flatten(1) for examples in (data.train_set, data.targets))
    distances = torch.cdist(train, targets)
    yield _row("cosine of the pictures", F.normalize(train) @ F.normalize(targets).T, truth)
    yield _row("minus distance of the pictures", -distances, truth)
    kernels = [torch.exp(-distances.square() / (2 * width**2)) for width in WIDTHS]
    best = max(kernels, key=lambda kernel: evaluate(kernel, truth).lds)
    yield _row("Gaussian kernel of the pictures, best width", best, truth)
    ceiling = truth.noise_ceiling()
    yield ["noise ceiling", "–" if ceiling is None else f"{ceiling:.2f}", "–"]


def _row(name: str, scores: Tensor, truth: Any) -> list[str]:
    found = evaluate(scores, truth)
    lower, upper = (bound.item() for bound in found.interval)
    return [name, f"{found.lds:.3f} (±{(upper - lower) / 2:.3f})", f"{found.slope:.2f}"]
