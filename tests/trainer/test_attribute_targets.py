"""Where attribute finds its targets, and models that build their layers late."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_trak as lt
from lightning_trak import TRAKCallback, attribute
from tests.conftest import Blobs, Classifier, make_data, make_trainer
from tests.trainer.references import fresh


def test_function_and_method_are_one(run):
    _, trainer, _, _ = run
    assert torch.equal(attribute(trainer).scores, trainer.attribute().scores)
    assert L.Trainer.attribute is attribute


def test_targets_are_looked_for_in_order(run):
    _, trainer, _, _ = run

    class Many(Blobs):
        def attribute_dataloader(self):
            return DataLoader(make_data(2), 2)

        def predict_dataloader(self):
            return DataLoader(make_data(3), 2)

    class Predict(Blobs):
        def predict_dataloader(self):
            return DataLoader(make_data(3), 2)

    assert trainer.attribute(datamodule=Many()).scores.shape == (40, 2)
    assert trainer.attribute(datamodule=Predict()).scores.shape == (40, 3)
    assert trainer.attribute(datamodule=Blobs()).scores.shape == (40, 7)
    assert trainer.attribute(dataloaders=DataLoader(make_data(5), 2)).scores.shape == (40, 5)
    assert trainer.attribute(dataloaders=DataLoader(make_data(5), 2), datamodule=Blobs()).scores.shape == (40, 5)
    assert trainer.attribute(dataloaders=Predict()).scores.shape == (40, 3)


def test_loaders_of_the_module_itself(tmp_path):
    class WithData(Classifier):
        def train_dataloader(self):
            return DataLoader(make_data(16), 8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(make_data(8), 8)

        def test_dataloader(self):
            return DataLoader(make_data(5, 2), 2)

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(WithData())
    expected = trainer.attribute().scores
    assert expected.shape == (16, 5)
    torch.testing.assert_close(fresh(tmp_path).attribute(WithData()).scores, expected)


class Late(lt.ClassificationMixin, L.LightningModule):
    """Makes its layers in hooks."""

    def setup(self, stage):
        if not hasattr(self, "first"):
            self.first = torch.nn.Linear(4, 4)

    def configure_model(self):
        if not hasattr(self, "last"):
            self.last = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x).tanh())

    training_step = Classifier.training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_layers_made_in_setup_or_configure_model(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Late(), DataLoader(make_data(16), 8))
    targets = DataLoader(make_data(5, 2), 5)
    expected = trainer.attribute(dataloaders=targets).scores
    torch.testing.assert_close(fresh(tmp_path).attribute(Late(), dataloaders=targets).scores, expected)


def test_layers_are_not_made_from_weights_that_another_process_writes_or_discards(tmp_path, monkeypatch):
    """Names of weights are read from the first checkpoint that is found: not from one that is not there any more."""
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Late(), DataLoader(make_data(16), 8))
    targets = DataLoader(make_data(5, 2), 5)
    expected = trainer.attribute(dataloaders=targets).scores
    glob, folder = Path.glob, tmp_path / "store" / "checkpoints"
    (folder / "0.1.partial").mkdir()
    (folder / "0.1.partial" / "weights.safetensors").write_bytes(b"half")

    def found(path, pattern, **options):
        gone = [folder / name / "weights.safetensors" for name in ("0.1.partial", "00")]
        yield from gone if pattern.endswith("/weights.safetensors") else []
        yield from glob(path, pattern, **options)

    monkeypatch.setattr(Path, "glob", found)
    torch.testing.assert_close(fresh(tmp_path).attribute(Late(), dataloaders=targets).scores, expected)


def test_layers_that_need_the_datamodule(tmp_path):
    class Sized(Late):
        def setup(self, stage):
            if not hasattr(self, "first"):
                self.first = torch.nn.Linear(len(self.trainer.datamodule.train_set[0][0]), 4)

    class Data(Blobs):
        val_dataloader = L.LightningDataModule.val_dataloader

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Sized(), datamodule=Data())
    torch.testing.assert_close(fresh(tmp_path).attribute(Sized(), datamodule=Data()).scores, trainer.attribute().scores)


def test_data_are_prepared_and_set_up_once_for_layers_and_loaders(tmp_path, monkeypatch):
    """In Lightning's order, and by one process of each machine."""
    called = []

    class Noting:
        def prepare_data(self):
            called.append((type(self).__name__, "prepare"))

        def setup(self, stage):
            called.append((type(self).__name__, stage))
            super().setup(stage)

    class Module(Noting, Late):
        pass

    class Data(Noting, Blobs):
        val_dataloader = L.LightningDataModule.val_dataloader

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Module(), datamodule=Data())
    called.clear()
    fresh(tmp_path).attribute(Module(), datamodule=Data())
    assert called[:4] == [("Data", "prepare"), ("Module", "prepare"), ("Data", "fit"), ("Module", "fit")]
    assert len(called) == len({*called})
    called.clear()
    monkeypatch.setattr(L.Trainer, "local_rank", 1)
    fresh(tmp_path).attribute(Module(), datamodule=Data())
    assert not any(what == "prepare" for _, what in called)


@pytest.mark.parametrize("fitted", [True, False])
def test_a_module_that_builds_its_layers_in_every_setup_keeps_its_weights(tmp_path, fitted):
    class Rebuilds(Late):
        def setup(self, stage):
            self.first = torch.nn.Linear(4, 4)

        def train_dataloader(self):
            return DataLoader(make_data(16), 8)

        def test_dataloader(self):
            return DataLoader(make_data(5, 2), 5)

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    module = Rebuilds()
    trainer.fit(module)
    if not fitted:
        weights, module = module.state_dict(), Rebuilds()
        module.first, module.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
        module.load_state_dict(weights)
        trainer = fresh(tmp_path)
    before = [(name, value, value.clone()) for name, value in module.named_parameters()]
    trainer.attribute(module)
    after = dict(module.named_parameters())
    assert list(after) == [name for name, _, _ in before]
    assert all(after[name] is value and torch.equal(value, copy) for name, value, copy in before)


def test_parameters_declared_in_another_order(run):
    root, trainer, module, data = run

    class Reordered(Classifier):
        def __init__(self):
            super().__init__()
            last = self.net.pop(4)
            self._modules = {"extra": torch.nn.Identity(), **self._modules}
            self.net.append(last)
            self.net._modules = dict(reversed(self.net._modules.items()))

        def forward(self, x):
            for name in map(str, range(5)):
                x = self.net._modules[name](x)
            return x

    assert [n for n, _ in Reordered().named_parameters()] != [n for n, _ in module.named_parameters()]
    torch.testing.assert_close(fresh(root).attribute(Reordered(), datamodule=data).scores, trainer.attribute().scores)
