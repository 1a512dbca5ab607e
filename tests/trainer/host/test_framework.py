"""The same program written with ``lightning`` and with ``pytorch_lightning``: the same numbers, and never a mixture."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_trak as lt
from lightning_trak.trainer.callback import check_supported
from lightning_trak.trainer.host import framework
from tests.conftest import make_data

PACKAGES = [lightning.pytorch, pytorch_lightning]


def write_program(package):
    """A program as a user of that package writes it: module, contrastive module, datamodule and Trainer."""

    class Classifier(lt.ClassificationMixin, package.LightningModule):
        def __init__(self, hidden=6):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(
                nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 3)
            )

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.Adam((value for value in self.parameters() if value.requires_grad), lr=0.05)

    class Pairs(lt.ContrastiveMixin, Classifier):
        contrast_size = 12

        def __init__(self):
            super().__init__()
            self.words, self.logit_scale = nn.Embedding(3, 3), nn.Parameter(torch.tensor(1.0))

        def get_embeddings(self, batch):
            return self(batch[0]), self.words(batch[1])

        def training_step(self, batch, batch_idx):
            return self.batch_loss(batch)

    class Blobs(package.LightningDataModule):
        def setup(self, stage):
            if stage == "fit":
                self.train_set, self.val_set = make_data(40), make_data(12, 1)
            if stage == "test":
                self.test_set = make_data(7, 2)

        def train_dataloader(self):
            return DataLoader(self.train_set, 8, shuffle=True, drop_last=True)

        def val_dataloader(self):
            return DataLoader(self.val_set, 6)

        def test_dataloader(self):
            return DataLoader(self.test_set, 3)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] / 2, batch[1]

    def make_trainer(root, *callbacks, **options):
        options = {"max_epochs": 2, "logger": False} | options
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        return package.Trainer(default_root_dir=root, accelerator="cpu", callbacks=list(callbacks), **quiet, **options)

    def fit(root, *callbacks, module=Classifier, **options):
        package.seed_everything(0, verbose=False)
        trainer, model, data = make_trainer(root, *callbacks, **options), module(), Blobs()
        trainer.fit(model, datamodule=data)
        return trainer, model, data

    return SimpleNamespace(
        package=package, Classifier=Classifier, Pairs=Pairs, Blobs=Blobs, make_trainer=make_trainer, fit=fit
    )


PROGRAMS = [write_program(package) for package in PACKAGES]
each = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.package.__name__)
mixed = pytest.mark.parametrize(("program", "other"), [PROGRAMS, PROGRAMS[::-1]], ids=["lightning", "pytorch"])


def callbacks_of(program, root, **options):
    every = program.package.callbacks.ModelCheckpoint(root / "files", every_n_epochs=1, save_top_k=-1)
    return lt.TRAKCallback(root / "store", proj_dim=16, **options), every


def same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("featurize_on", ["save", "fit_end"])
@each
def test_training_is_untouched_and_that_of_either_package(tmp_path, program, featurize_on):
    _, plain, _ = PROGRAMS[0].fit(tmp_path / "plain")
    _, watched, _ = program.fit(tmp_path, *callbacks_of(program, tmp_path, featurize_on=featurize_on))
    assert same_weights(watched, plain)
    assert len(lt.FeatureStore(tmp_path / "store").digests) == 2


@pytest.mark.parametrize("module", ["Classifier", "Pairs"])
def test_features_and_scores_are_the_same(tmp_path, module):
    stores, scores, selves = [], [], []
    for program in PROGRAMS:
        root = tmp_path / program.package.__name__
        trainer, _, data = program.fit(root, *callbacks_of(program, root), module=getattr(program, module))
        stores.append(lt.FeatureStore(root / "store"))
        scores.append(trainer.attribute(data).scores)
        selves.append(trainer.attribute_self(data))
    assert stores[0].digests == stores[1].digests
    for digest in stores[0].digests:
        first, second = stores[0][digest], stores[1][digest]
        (one,), (other,) = (entry.train.blocks(None, 40) for entry in (first, second))
        assert one.get("features", one.get("values")).any()
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(other[name], array)
    assert scores[0].shape == (40, 7)
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(selves[0], selves[1])


@mixed
def test_a_store_of_one_package_is_read_by_the_other(tmp_path, program, other):
    trainer, _, data = program.fit(tmp_path, *callbacks_of(program, tmp_path))
    expected = trainer.attribute(data).scores
    again = other.make_trainer(tmp_path, callbacks_of(other, tmp_path)[0])
    assert torch.equal(again.attribute(other.Classifier(), datamodule=other.Blobs()).scores, expected)


@mixed
def test_checkpoint_files_of_either_package(tmp_path, program, other):
    """Their hyperparameters are of classes of the package that wrote them."""
    trainer, _, data = program.fit(tmp_path, *callbacks_of(program, tmp_path))
    expected, files = trainer.attribute(data).scores, sorted((tmp_path / "files").iterdir())
    for name, reader in (("own", program), ("other", other)):
        fresh = reader.make_trainer(tmp_path, lt.TRAKCallback(tmp_path / name, proj_dim=16))
        found = fresh.attribute(reader.Classifier(), datamodule=reader.Blobs(), ckpt_path=files).scores
        assert torch.equal(found, expected)


@each
def test_resumed(tmp_path, program):
    trak, every = callbacks_of(program, tmp_path)
    program.fit(tmp_path, trak, every)
    run = trak._run
    trainer = program.make_trainer(tmp_path, *callbacks_of(program, tmp_path), max_epochs=3)
    trainer.fit(program.Classifier(), datamodule=program.Blobs(), ckpt_path=str(min((tmp_path / "files").iterdir())))
    store = lt.FeatureStore(tmp_path / "store")
    assert {entry.meta["run"] for entry in store} == {run}


@each
def test_ground_truth(tmp_path, program):
    trainer, _, data = program.fit(tmp_path, *callbacks_of(program, tmp_path))
    attribution = trainer.attribute(data)
    quiet = {"enable_checkpointing": False, "max_epochs": 1}

    def make():
        return program.make_trainer(tmp_path, **quiet)

    truth = lt.retrain_subsets(program.Classifier, data, make, n_subsets=3, repeats=2, dirpath=tmp_path / "runs")
    assert truth.outputs.shape == (3, 7)
    assert -1 <= lt.evaluate(attribution, truth).lds <= 1
    what_if = lt.counterfactuals(
        attribution, program.Classifier, data, make, targets=[2], k=[4], repeats=1, dirpath=tmp_path / "without"
    )
    assert what_if.targets == (2,)


@each
def test_finetuning_is_recognised(tmp_path, program):
    class Unfreezing(program.package.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

    with pytest.warns(UserWarning, match="Unfreezing may unfreeze them: all are attributed"):
        program.fit(tmp_path, *callbacks_of(program, tmp_path), Unfreezing())


@each
def test_states_are_those_of_the_package(tmp_path, program):
    """A module may compare them by identity."""
    states, seen = program.package.trainer.states, []

    class Asking(program.Classifier):
        def model_output(self, batch):
            state = self.trainer.state
            seen.append(state.fn is states.TrainerFn.PREDICTING and state.stage is states.RunningStage.PREDICTING)
            seen.append(state.status is states.TrainerStatus.RUNNING)
            return super().model_output(batch)

    program.fit(tmp_path, *callbacks_of(program, tmp_path), module=Asking)
    assert seen
    assert all(seen)


@each
def test_strategies_are_those_of_the_package(tmp_path, program):
    """Of the same names, in the other package."""
    options = {"strategy": program.package.strategies.DDPStrategy(), "devices": 1}
    trainer = program.make_trainer(tmp_path, lt.TRAKCallback(tmp_path), **options)
    check_supported(trainer, program.Classifier())
    trainer.strategy.__class__ = program.package.strategies.FSDPStrategy
    with pytest.raises(program.package.utilities.exceptions.MisconfigurationException, match="got FSDPStrategy"):
        check_supported(trainer, program.Classifier())


@each
def test_errors_are_those_of_the_package(tmp_path, program):
    """Of two exceptions of one name, a program catches that of the package that it imports."""
    trainer = program.make_trainer(tmp_path)
    with pytest.raises(program.package.utilities.exceptions.MisconfigurationException, match="no TRAKCallback"):
        trainer.attribute(program.Classifier())


@mixed
def test_a_module_of_the_other_package(tmp_path, program, other):
    trainer, _, data = program.fit(tmp_path, *callbacks_of(program, tmp_path))
    name, foreign = program.package.__name__, other.package.__name__
    said = rf"model must be a {name}\.LightningModule.*Trainer is of {name}, got .*Classifier, a {foreign}\.Lightning"
    with pytest.raises(TypeError, match=said):
        trainer.attribute(other.Classifier(), datamodule=data)
    with pytest.raises(TypeError, match=said):
        trainer.attribute_self(other.Classifier(), datamodule=data)


@mixed
def test_lightning_itself_refuses_to_train_a_mixture(tmp_path, program, other):
    """Before any hook of a callback."""
    trainer = program.make_trainer(tmp_path, lt.TRAKCallback(tmp_path / "new"))
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`.*Classifier"):
        trainer.fit(other.Classifier(), datamodule=program.Blobs())
    with pytest.raises(ValueError, match="Expected a parent"):
        trainer.fit(program.Classifier(), datamodule=other.Blobs())


@mixed
def test_a_datamodule_of_the_other_package(tmp_path, program, other):
    trainer, model, _ = program.fit(tmp_path, *callbacks_of(program, tmp_path))
    said = (
        rf"datamodule must be a {program.package.__name__}\.LightningDataModule.*got .*Blobs, a"
        rf" {other.package.__name__}\.LightningDataModule"
    )
    for wrong in (
        lambda: trainer.attribute(other.Blobs()),
        lambda: trainer.attribute(model, datamodule=other.Blobs()),
        lambda: trainer.attribute(model, other.Blobs()),
        lambda: trainer.attribute_self(other.Blobs()),
    ):
        with pytest.raises(TypeError, match=said):
            wrong()


@each
def test_what_is_no_part_of_lightning(tmp_path, program):
    trainer = program.make_trainer(tmp_path, lt.TRAKCallback(tmp_path))
    name = program.package.__name__
    with pytest.raises(TypeError, match=rf"got torch.nn.*Linear\. Derive it from {name}\.LightningModule"):
        trainer.attribute(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=rf"got builtins\.list\. Derive it from {name}\.LightningDataModule"):
        trainer.attribute(program.Classifier(), datamodule=[1])
    with pytest.raises(TypeError, match=r"a lightning\.pytorch\.Trainer or a pytorch_lightning\.Trainer, got builtins"):
        lt.attribute("trainer")


@each
def test_it_is_a_callback_of_either_package(tmp_path, program):
    trak = lt.TRAKCallback(tmp_path)
    assert isinstance(trak, program.package.Callback)
    trainer = program.package.Trainer(callbacks=trak, logger=False, accelerator="cpu")
    assert trak in trainer.callbacks
    assert copy.deepcopy(trak).proj_dim == trak.proj_dim


def test_messages_and_random_states_are_shared():
    """So the functions of one package do for both."""
    other = pytorch_lightning.utilities
    assert other.rank_zero.rank_zero_info is framework.rank_zero_info
    assert other.rank_zero.rank_zero_warn is framework.rank_zero_warn


def test_an_alias_is_not_another_package(monkeypatch):
    """Some programs make the second package an alias of the first; or there is another module of that name."""
    for module in (lightning.pytorch, ModuleType("pytorch_lightning")):
        monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
        assert [loaded.name for loaded in framework._loaded()] == ["lightning.pytorch"]
        lt.TRAKCallback()
        assert framework.Callback.__bases__ == (lightning.pytorch.Callback,)
    monkeypatch.undo()
    framework.extend_loaded()
    assert framework.Callback.__bases__ == tuple(package.Callback for package in PACKAGES)


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_other_package_is_not_imported():
    run_python(
        "import sys, lightning_trak as lt; lt.TRAKCallback();"
        "assert not {'pytorch_lightning', 'lightning_fabric'} & {*sys.modules}"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import pytorch_lightning as pl, lightning_trak as lt; assert pl.Trainer.attribute is lt.attribute",
        "import lightning_trak as lt, pytorch_lightning as pl; trak = lt.TRAKCallback()",
        "import lightning_trak as lt; trak = lt.TRAKCallback(); import pytorch_lightning as pl;"
        "trak.setup(pl.Trainer(callbacks=[trak], logger=False, accelerator='cpu'), None, 'predict')",
    ],
)
def test_the_methods_are_there_whichever_is_imported_first(imports):
    run_python(
        f"{imports}; assert pl.Trainer.attribute is lt.attribute; assert pl.Trainer.suspects is lt.suspects;"
        "assert pl.Trainer.attribute_self is lt.attribute_self"
    )
