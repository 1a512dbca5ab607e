"""What it costs to prepare, in operations of a plain forward and backward pass."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import flop_registry

from lightning_trak import ClassificationMixin, TRAKCallback
from tests.conftest import make_trainer


class Operations(TorchDispatchMode):
    """Counts floating-point operations as `FlopCounterMode` does, which stumbles over leaves of our own."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        operations = flop_registry.get(func._overloadpacket)
        self.count += operations(*args, **(kwargs or {}), out_val=result) if operations else 0
        return result


class Pictures(ClassificationMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )
        self.loaders = {}

    def forward(self, x):
        return self.net(x)

    def train_dataloader(self):
        return self.loaders["train"]


def loader(n):
    return DataLoader(TensorDataset(torch.randn(n, 3, 32, 32), torch.arange(n) % 10), batch_size=32)


class Silent(Pictures):
    """Names no predictions, which would cost a forward pass."""

    describe = None


def operations_of_attribute(root, n, m, model=Silent):
    torch.manual_seed(0)
    model = model()
    model.loaders["train"] = loader(n)
    torch.save(model.state_dict(), root / f"{n}.pt")
    trak = TRAKCallback(root / f"store{type(model).__name__}{n}", proj_dim=64, projector="factored", damping=0.1)
    trainer = make_trainer(root, trak)
    with Operations() as operations:
        trainer.attribute(model, loader(m), ckpt_path=root / f"{n}.pt")
    return operations.count


def test_preparing_costs_less_than_sixteen_examples(tmp_path):
    """For train set and targets together; what is left when so much an example is taken off."""
    with Operations() as plain:
        Pictures()(torch.randn(32, 3, 32, 32)).sum().backward()
    few, more = operations_of_attribute(tmp_path, 64, 32), operations_of_attribute(tmp_path, 128, 64)
    each = (more - few) / 96
    assert each < 1.1 * plain.count / 32
    assert 0 < (few - 96 * each) * 32 / plain.count < 16


def test_predictions_cost_a_forward_pass_over_the_targets(tmp_path):
    with Operations() as plain:
        Pictures()(torch.randn(64, 3, 32, 32))
    said, silent = (operations_of_attribute(tmp_path, 64, 64, model) for model in (Pictures, Silent))
    assert said - silent == pytest.approx(plain.count, rel=0.05)
