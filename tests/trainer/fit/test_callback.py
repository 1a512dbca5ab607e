"""TRAKCallback inside `fit`: what is featurized when, and that training does not notice."""

from __future__ import annotations

import os
import random
import shutil
import signal
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    ProgressBar,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from lightning_trak import FeatureStore, TRAKCallback
from lightning_trak.isolation.module_state import ModuleChanged
from lightning_trak.store.weights import read_weights, weights_digest
from tests.conftest import Blobs, Classifier, make_data, make_trainer
from tests.trainer.references import Noisy


def fit(root, *callbacks, seed=0, module=None, data=None, ckpt_path=None, **kwargs):
    L.seed_everything(seed, verbose=False)
    module = (module or Classifier)() if module is None or isinstance(module, type) else module
    trainer = make_trainer(root, *callbacks, **kwargs)
    data = Blobs() if data is None else data
    if isinstance(data, L.LightningDataModule):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    else:
        validated = type(module).validation_step is not L.LightningModule.validation_step
        trainer.fit(module, data, DataLoader(make_data(12, 1), 6) if validated else None, ckpt_path=ckpt_path)
    return trainer, module


def digests_of(*paths):
    return [weights_digest(read_weights(path)) for path in paths]


def every_epoch(root, **kwargs):
    return ModelCheckpoint(root / "files", save_top_k=-1, **kwargs)


RUNS = {
    "plain": {},
    "mid-epoch validation": {"val_check_interval": 0.4},
    "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    "bf16-true": {"precision": "bf16-true"},
    "no inference mode": {"inference_mode": False},
    "no sanity check": {"num_sanity_val_steps": 0},
    "workers": {"data": "workers"},
}


@pytest.mark.parametrize("featurize_on", ["save", "fit_end"])
@pytest.mark.parametrize("run", RUNS)
def test_training_is_bit_identical_with_and_without(tmp_path, run, featurize_on):
    def train(name, *extra):
        options = dict(RUNS[run])
        data = Blobs(num_workers=1 if options.pop("data", None) else 0)
        saving = every_epoch(tmp_path / name, every_n_train_steps=3)
        trainer, module = fit(tmp_path / name, *extra, saving, data=data, **options)
        optimizer = trainer.optimizers[0].state_dict()["state"]
        state = [*module.state_dict().values(), *(part[key] for part in optimizer.values() for key in sorted(part))]
        rng = [torch.rand(3), torch.tensor(np.random.rand(3)), torch.tensor([random.random()])]
        files = {path.name: digests_of(path) for path in sorted((tmp_path / name / "files").iterdir())}
        return [*state, *rng], trainer.callback_metrics, files, [m.training for m in module.modules()]

    without, metrics, files, modes = train("without")
    trak = TRAKCallback(tmp_path / "store", featurize_on=featurize_on)
    with_trak, metrics_with, files_with, modes_with = train("with", trak)
    assert len(FeatureStore(tmp_path / "store")) == len(files) > 2
    assert all(entry.complete for entry in FeatureStore(tmp_path / "store"))
    assert all(torch.equal(one, other) for one, other in zip(without, with_trak, strict=True))
    assert metrics == metrics_with
    assert files == files_with
    assert modes == modes_with


def test_gradients_in_flight_are_not_touched(tmp_path):
    class SavesMidStep(Classifier):
        def on_after_backward(self):
            self.trainer.save_checkpoint(tmp_path / f"manual-{self.trainer.global_step}.ckpt")

    kwargs = {"accumulate_grad_batches": 2, "max_epochs": 2}
    _, without = fit(tmp_path / "a", module=SavesMidStep, **kwargs)
    _, with_trak = fit(tmp_path / "b", TRAKCallback(tmp_path / "store"), module=SavesMidStep, **kwargs)
    assert len(FeatureStore(tmp_path / "store")) > 3
    pairs = zip(without.state_dict().values(), with_trak.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_save_featurizes_every_distinct_set_of_weights_even_of_deleted_files(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=1, save_last=True)
    fit(tmp_path, TRAKCallback(tmp_path / "store"), best, every_epoch(tmp_path), max_epochs=4)
    store = FeatureStore(tmp_path / "store")
    paths = sorted((tmp_path / "files").iterdir(), key=lambda path: read_checkpoint_step(path))
    assert store.digests == digests_of(*paths)
    assert [store[digest].meta["epoch"] for digest in store.digests] == [0, 1, 2, 3]
    assert all(store[digest].complete for digest in store.digests)


def read_checkpoint_step(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_top_k_losers_stay_in_the_store_when_featurized_on_save(tmp_path):
    saving = ModelCheckpoint(tmp_path / "files", monitor="val_loss", save_top_k=1, mode="max")
    fit(tmp_path, TRAKCallback(tmp_path / "store"), saving, max_epochs=4)
    kept = list((tmp_path / "files").iterdir())
    assert len(kept) == 1
    assert set(digests_of(*kept)) <= set(FeatureStore(tmp_path / "store").digests)


def test_fit_end_featurizes_what_the_run_kept(tmp_path):
    class SavesByHand(Classifier):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                self.trainer.save_checkpoint(tmp_path / "by_hand.ckpt")

    saving = ModelCheckpoint(tmp_path / "files", monitor="val_loss", save_top_k=2, save_last=True)
    trak = TRAKCallback(tmp_path / "store", featurize_on="fit_end")
    fit(tmp_path, trak, saving, module=SavesByHand(), max_epochs=6)
    kept = [*(tmp_path / "files").iterdir(), tmp_path / "by_hand.ckpt"]
    store = FeatureStore(tmp_path / "store")
    assert set(store.digests) == set(digests_of(*kept))
    assert all(entry.complete for entry in store)


def test_fit_end_knows_files_that_were_overwritten(tmp_path):
    class SavesByHand(Classifier):
        def on_train_epoch_end(self):
            self.trainer.save_checkpoint(tmp_path / "same.ckpt")

    trak = TRAKCallback(tmp_path / "store", featurize_on="fit_end")
    fit(tmp_path, trak, module=SavesByHand(), enable_checkpointing=False)
    assert FeatureStore(tmp_path / "store").digests == digests_of(tmp_path / "same.ckpt")


@pytest.mark.parametrize("featurize_on", ["save", "fit_end"])
def test_save_weights_only_works(tmp_path, featurize_on):
    saving = every_epoch(tmp_path, save_weights_only=True)
    fit(tmp_path, TRAKCallback(tmp_path / "store", featurize_on=featurize_on), saving)
    store = FeatureStore(tmp_path / "store")
    assert set(store.digests) == set(digests_of(*(tmp_path / "files").iterdir()))
    assert len(store) == 3


@pytest.mark.parametrize("first", ["trak", "average"])
@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.5)])
def test_averaged_weights_are_what_counts(tmp_path, averaging, first):
    callbacks = [TRAKCallback(tmp_path / "store"), averaging()]
    callbacks = callbacks if first == "trak" else callbacks[::-1]
    fit(tmp_path, *callbacks, every_epoch(tmp_path))
    store = FeatureStore(tmp_path / "store")
    content = torch.load(next((tmp_path / "files").iterdir()), weights_only=True)
    assert not torch.equal(content["state_dict"]["net.0.weight"], content["current_model_state"]["net.0.weight"])
    assert set(store.digests) == set(digests_of(*(tmp_path / "files").iterdir()))


def test_weights_that_the_module_puts_into_the_checkpoint_are_what_counts(tmp_path):
    class OwnAverage(Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {name: value * 0.5 for name, value in checkpoint["state_dict"].items()}

    fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path), module=OwnAverage(), max_epochs=1)
    assert FeatureStore(tmp_path / "store").digests == digests_of(*(tmp_path / "files").iterdir())


def test_resumed_fit_adds_only_new_checkpoints(tmp_path):
    fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path), max_epochs=2)
    before = FeatureStore(tmp_path / "store").digests
    last = max((tmp_path / "files").iterdir(), key=read_checkpoint_step)
    fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path), max_epochs=4, ckpt_path=last)
    assert FeatureStore(tmp_path / "store").digests[:2] == before
    assert len(FeatureStore(tmp_path / "store")) == 4


def test_two_runs_share_a_store(tmp_path):
    for seed in range(2):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), seed=seed, max_epochs=2)
    assert len(FeatureStore(tmp_path / "store")) == 4


def test_the_same_run_again_costs_nothing(tmp_path, monkeypatch):
    fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path / "a"))
    monkeypatch.setattr(
        "lightning_trak.trainer.featurizing.featurization.FeaturizationLoop.run", None
    )  # it would fail if it were called
    fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path / "b"))
    assert len(FeatureStore(tmp_path / "store")) == 3


def test_manual_save_after_fit_is_taken_and_featurized_by_attribute(tmp_path):
    trainer, module = fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path), max_epochs=1)
    torch.nn.init.zeros_(module.net[4].bias)
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    store = FeatureStore(tmp_path / "store")
    assert store.digests[1:] == digests_of(tmp_path / "final.ckpt")
    assert not store[store.digests[1]].complete
    assert trainer.attribute().scores.shape == (40, 7)
    assert store[store.digests[1]].complete


@pytest.mark.parametrize("fast_dev_run", [True, 2])
def test_fast_dev_run_checks_and_leaves_nothing(tmp_path, fast_dev_run):
    fit(tmp_path, TRAKCallback(tmp_path / "store"), fast_dev_run=fast_dev_run)
    assert not (tmp_path / "store").exists()

    class Detached(Classifier):
        def model_output(self, batch):
            return super().model_output(batch).detach()

    with pytest.raises(ValueError, match="does not depend on any"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), module=Detached(), fast_dev_run=fast_dev_run)


def test_learning_rate_finder_leaves_no_checkpoint_of_its_own(tmp_path):
    fit(tmp_path, TRAKCallback(tmp_path / "store"), LearningRateFinder(num_training_steps=5), every_epoch(tmp_path))
    store = FeatureStore(tmp_path / "store")
    assert set(store.digests) == set(digests_of(*(tmp_path / "files").iterdir()))
    assert len(store) == 3


def test_tuner_before_fit(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path))
    module, data = Classifier(), Blobs()
    Tuner(trainer).lr_find(module, datamodule=data, num_training=5)
    Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1)
    trainer.fit(module, datamodule=data)
    store = FeatureStore(tmp_path / "store")
    assert set(store.digests) == set(digests_of(*(tmp_path / "files").iterdir()))


def test_checkpoint_plugins_of_the_user_still_work(tmp_path):
    plugin = AsyncCheckpointIO()
    fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path), plugins=[plugin])
    assert set(FeatureStore(tmp_path / "store").digests) == set(digests_of(*(tmp_path / "files").iterdir()))


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")  # Lightning, of OnExceptionCheckpoint
def test_a_crash_in_training_loses_nothing(tmp_path):
    class Crashes(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                raise RuntimeError("power cut")

    rescue = OnExceptionCheckpoint(tmp_path / "rescue")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path), rescue, module=Crashes())
    store = FeatureStore(tmp_path / "store")
    assert [store[digest].complete for digest in store.digests] == [True, False]
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"))
    assert trainer.attribute(Classifier(), datamodule=Blobs()).scores.shape == (40, 7)
    assert all(entry.complete for entry in store)


def test_rows_are_dataset_rows_whatever_the_loader_does(tmp_path):
    """The loader shuffles and drops; the features equal those of a plain loop over the dataset in float64."""
    trak = TRAKCallback(tmp_path / "store", projector="identity")
    _, module = fit(tmp_path, trak, max_epochs=1, data=Blobs(n=21, batch_size=8))
    entry = next(iter(FeatureStore(tmp_path / "store")))
    module.double().eval()
    for row, (x, y) in enumerate(make_data(21)):
        output = module.model_output((x[None].double(), y[None]))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(output.sum(), list(module.parameters()))])
        p = module(x[None].double()).softmax(1)[0, y]
        np.testing.assert_allclose(entry.features[row], gradient.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(entry.loss_grad[row], (1 - p).item(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(entry.curvature[row], (p * (1 - p)).item(), rtol=1e-4, atol=1e-6)
    module.float()


def test_featurize_dataloader_takes_precedence(tmp_path):
    class Plain(Blobs):
        def train_dataloader(self):
            return DataLoader(Noisy(self.train_set), 8, shuffle=True)

        def featurize_dataloader(self):
            return DataLoader(self.train_set, 5)

    fit(tmp_path, TRAKCallback(tmp_path / "store"), data=Plain(), max_epochs=1)  # no warning: warnings are errors
    assert FeatureStore(tmp_path / "store").n_train == 40


def test_random_augmentation_is_warned_of_and_still_reproducible_as_data(tmp_path):
    loader = DataLoader(Noisy(make_data(40)), 8, shuffle=True)
    with pytest.warns(UserWarning, match=r"Two reads of the same train examples differ.*featurize_dataloader"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), data=loader, max_epochs=1)
    with pytest.warns(UserWarning, match="Two reads"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), data=loader, seed=1, max_epochs=1)
    assert len(FeatureStore(tmp_path / "store")) == 2


def test_random_augmentation_is_warned_of_once_with_what_to_do(tmp_path):
    loader, targets = DataLoader(Noisy(make_data(40)), 8, shuffle=True), DataLoader(Noisy(make_data(5)), 5)

    def use():
        trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store"), data=loader)
        for _ in range(2):
            trainer.attribute(dataloaders=targets)
        trainer.attribute_self()

    with pytest.warns(UserWarning, match="Two reads of the same") as caught:
        use()
    train, target = [str(warning.message) for warning in caught if "Two reads" in str(warning.message)]
    assert "train examples differ" in train
    assert "featurize_dataloader" in train
    assert "target examples differ" in target
    assert "dataloaders=" in target
    assert "featurize_dataloader" not in target


def test_progress_says_what_and_how_far(tmp_path, capfd):
    trak = TRAKCallback(tmp_path / "store")
    fit(tmp_path, trak, TQDMProgressBar(), max_epochs=1, enable_progress_bar=True)
    assert "Featurizing checkpoint 1 (epoch 0, step 5)" in "".join(capfd.readouterr())
    fit(tmp_path, TRAKCallback(tmp_path / "store2"), max_epochs=1, enable_progress_bar=False)
    assert "Featurizing" not in "".join(capfd.readouterr())


def test_progress_joins_a_live_rich_display(tmp_path):
    class Live:
        """What is used of `rich.progress.Progress`; rich itself would change every other test's progress bar."""

        def __init__(self):
            self.live = SimpleNamespace(is_started=True)
            self.tasks = {}

        def add_task(self, description, total):
            self.tasks[description] = [0, total, True]
            return description

        def update(self, task, advance):
            self.tasks[task][0] += advance

        def remove_task(self, task):
            self.tasks[task][2] = False

    class RichLike(ProgressBar):
        progress = Live()

    fit(tmp_path, TRAKCallback(tmp_path / "store"), RichLike(), max_epochs=1, enable_progress_bar=True)
    stages = (
        "Curvature of checkpoint 1 (epoch 0, step 5): factors",
        "Curvature of checkpoint 1 (epoch 0, step 5): eigenvalues",
    )
    stages += ("Featurizing checkpoint 1 (epoch 0, step 5)",)
    measuring = {f"Measuring: {what}": [4, 4, False] for what in ("factors", "eigenvalues")}
    assert RichLike.progress.tasks == measuring | {stage: [40, 40, False] for stage in stages}


def test_models_that_vmap_cannot_differentiate_fall_back_to_the_loop(tmp_path):
    class Branches(Classifier):
        def model_output(self, batch):
            x, y = batch
            scale = 2.0 if x.sum().item() > 1e9 else 1.0
            return super().model_output((x * scale, y))

    fit(tmp_path, TRAKCallback(tmp_path / "a"), module=Branches, max_epochs=1)
    fit(tmp_path, TRAKCallback(tmp_path / "b", preconditioner="none"), max_epochs=1)
    (one,), (other,) = FeatureStore(tmp_path / "a"), FeatureStore(tmp_path / "b")
    np.testing.assert_allclose(one.features, other.features, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="gradients='vmap' cannot differentiate"):
        fit(tmp_path, TRAKCallback(tmp_path / "c", gradients="vmap"), module=Branches, max_epochs=1)


def test_a_module_with_model_output_alone(tmp_path):
    class Bare(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def model_output(self, batch):
            x, y = batch
            return (2.0 * (y > 0) - 1) * (x @ self.weight)

        def training_step(self, batch, batch_idx):
            return F_softplus(-self.model_output(batch)).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = DataLoader(make_data(40), 8)
    trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store"), module=Bare(), data=data, max_epochs=1)
    assert trainer.attribute(dataloaders=data).scores.shape == (40, 40)


F_softplus = torch.nn.functional.softplus


def test_augmentation_of_training_hooks_is_off_in_featurization(tmp_path):
    class Augments(Blobs):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x + torch.randn_like(x), y) if self.trainer.training else (x, y)

    trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store"), data=Augments(), max_epochs=1)  # and no warning
    files = ModelCheckpoint(tmp_path / "none")
    again = make_trainer(tmp_path, TRAKCallback(tmp_path / "again"), files)
    weights = FeatureStore(tmp_path / "store")
    path = weights[weights.digests[0]].weights_path
    scores = again.attribute(Classifier(), datamodule=Augments(), ckpt_path=path).scores
    torch.testing.assert_close(scores, trainer.attribute().scores)


def test_a_buffer_that_no_checkpoint_holds(tmp_path):
    class Positions(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.ones(4), persistent=False)

        def forward(self, x):
            return super().forward(x + self.shift)

    for precision in ("32-true", "bf16-true"):
        store = tmp_path / precision
        trainer, _ = fit(store, TRAKCallback(store / "s"), module=Positions(), max_epochs=1, precision=precision)
        again = make_trainer(store, TRAKCallback(store / "s"), precision=precision)
        scores = again.attribute(Positions(), datamodule=Blobs()).scores
        torch.testing.assert_close(scores, trainer.attribute().scores)


def test_an_output_that_depends_on_a_later_row_of_the_batch(tmp_path):
    class Longest(Classifier):
        def model_output(self, batch):
            output = super().model_output(batch)
            return torch.cat([output[:3], output[3:] + 0.1 * batch[0][:1, 0]])

    with pytest.raises(ValueError, match=r"for train row [3-7] in a batch.*for it alone"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), module=Longest())


def test_a_checkpoint_that_cannot_be_featurized_is_named_and_training_goes_on(tmp_path, said):
    class Diverges(Classifier):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                torch.nn.init.constant_(self.net[4].weight, float("nan"))

    with pytest.warns(UserWarning, match=r"At checkpoint \w{32} .*step 10\): .*NaN.*Training goes on") as caught:
        trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path), module=Diverges())
    assert sum("featurized" in str(warning.message) for warning in caught) == 1
    assert said()[-1].startswith("TRAKCallback: 2 checkpoints could not be featurized. trainer.attribute(...)")
    assert trainer.global_step == 15
    store = FeatureStore(tmp_path / "store")
    assert [store[digest].complete for digest in store.digests] == [True, False, False]
    for digest in store.digests[1:]:
        store.discard(digest)
    assert make_trainer(tmp_path, TRAKCallback(tmp_path / "store")).attribute(Classifier(), datamodule=Blobs())


def test_what_model_output_logs_is_not_logged(tmp_path):
    class Logs(Classifier):
        def model_output(self, batch):
            self.log("margin", 1.0)
            self.log_dict({"other": 2.0})
            return super().model_output(batch)

    trainer, module = fit(tmp_path, TRAKCallback(tmp_path / "store"), module=Logs())
    assert trainer.attribute().scores.shape == (40, 7)
    assert set(trainer.logged_metrics) == {"train_loss", "val_loss"}
    assert module.log.__func__ is L.LightningModule.log


def test_only_selected_parameters(tmp_path):
    trak = TRAKCallback(tmp_path / "store", parameters="net.4.*", projector="identity")
    trainer, _ = fit(tmp_path, trak, max_epochs=1)
    store = FeatureStore(tmp_path / "store")
    assert list(store.manifest["parameters"]) == ["net.4.weight", "net.4.bias"]
    assert next(iter(store)).features.shape == (40, 3 * 6 + 3)
    assert trainer.attribute().scores.shape == (40, 7)


# ---------------------------------------------------------------------------------------------------- bad input


def test_two_callbacks(tmp_path):
    with pytest.raises(MisconfigurationException, match="2 TRAKCallbacks"):
        fit(tmp_path, TRAKCallback(tmp_path / "a"), RenamedCallback(tmp_path / "b"))


class RenamedCallback(TRAKCallback):
    """Lightning itself refuses two callbacks of one state key."""

    @property
    def state_key(self):
        return "renamed"


def test_module_without_model_output(tmp_path):
    class Plain(L.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    with pytest.raises(MisconfigurationException, match="does not define model_output"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), module=Plain(), data=DataLoader(make_data(8), 8))


def output_module(function):
    class Module(Classifier):
        def model_output(self, batch):
            return function(super().model_output(batch), batch)

    return Module()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda output, batch: output.mean(), r"returned a tensor of shape \(\).*\(b,\)"),
        (lambda output, batch: output[:, None], r"returned a tensor of shape \(8, 1\)"),
        (lambda output, batch: output[:5], r"returned shape \(5,\) for a batch of 8"),
        (lambda output, batch: output.detach().numpy(), "returned ndarray"),
        (lambda output, batch: output.detach(), "does not depend on any"),
        (lambda output, batch: output / 0, "model_output is NaN or infinite for train rows 0, 1"),
        (lambda output, batch: output - output.mean(), "and .* for it alone"),
        (lambda output, batch: output + torch.rand(len(output)), "and .* for it alone"),
    ],
)
def test_bad_model_outputs_fail_before_training(tmp_path, function, message):
    module = output_module(function)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_rows_with_infinite_outputs_or_gradients_are_named(tmp_path):
    x, y = make_data(40).tensors
    poisoned = DataLoader(TensorDataset(x.clone().index_fill_(0, torch.tensor([17, 33]), float("nan")), y), 40)
    with pytest.raises(ValueError, match="NaN or infinite for train rows 17, 33"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), data=poisoned)
    rooted = output_module(lambda output, batch: (output - output.detach()).abs().sqrt() + output)
    with pytest.warns(UserWarning, match="the gradient of model_output is NaN or infinite for train rows 0, 1"):
        fit(tmp_path, TRAKCallback(tmp_path / "store2"), module=rooted)


class Stream(IterableDataset):
    def __iter__(self):
        yield from make_data(16)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(Stream(), 8), TypeError, "iterable dataset"),
        (
            DataLoader(make_data(40), 8, sampler=SubsetRandomSampler(range(20))),
            ValueError,
            "reads 20 of the dataset's 40",
        ),
        ([DataLoader(make_data(40), 8), DataLoader(make_data(40), 8)], TypeError, "expected one torch"),
    ],
)
def test_loaders_without_rows(tmp_path, loader, error, message):
    class Tolerant(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)

    with pytest.raises(error, match=f"(?s){message}.*featurize_dataloader"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), module=Tolerant(), data=loader)


@pytest.mark.parametrize("limit", [0.5, 2])
def test_limits_that_truncate(tmp_path, limit):
    with pytest.raises(MisconfigurationException, match=r"limit_train_batches=.*leaves examples out.*Subset"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), limit_train_batches=limit)
    subset = DataLoader(Subset(make_data(40), range(20)), 8)
    fit(tmp_path, TRAKCallback(tmp_path / "store"), data=subset, limit_train_batches=100, max_epochs=1)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"data": Blobs(n=48)}, "40 examples, here 48"),
        ({"data": Blobs(seed=5)}, "as many examples as here, 40, with other content"),
        ({"trak": {"seed": 1}}, r"projection.seed=0, but here projection.seed=1"),
        ({"trak": {"projector": "sparse"}}, "projection.projector=.identity"),
        ({"trak": {"projector": "sparse", "proj_dim": 8}}, r"projection"),
        ({"trak": {"parameters": "net.0.*"}}, r"parameters.net.1.weight=.6., but here"),
        ({"module": Classifier(hidden=7)}, r"parameters.net.0.weight=\[6, 4\], but here .*\[7, 4\]"),
    ],
)
def test_a_store_of_another_kind_is_refused_before_training(tmp_path, second, message):
    fit(tmp_path, TRAKCallback(tmp_path / "store", preconditioner="none"), max_epochs=1)
    options = dict(second)
    trak = TRAKCallback(tmp_path / "store", preconditioner="none", **options.pop("trak", {}))
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, trak, max_epochs=1, **options)
    assert len(FeatureStore(tmp_path / "store")) == 1


def test_unwritable_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written.*another dirpath"):
        fit(tmp_path, TRAKCallback(tmp_path / "file" / "store"))


def test_full_disk_keeps_the_checkpoint_file_and_what_was_featurized(tmp_path, monkeypatch):
    calls, real = [], shutil.disk_usage

    def fills_up(path):
        calls.append(path)
        return real(path) if len(calls) <= 3 else real(path)._replace(free=100)  # twice when training begins

    monkeypatch.setattr("shutil.disk_usage", fills_up)
    with pytest.warns(UserWarning, match="No space left on device.*another dirpath"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path))
    monkeypatch.undo()
    store = FeatureStore(tmp_path / "store")
    assert [store[digest].complete for digest in store.digests] == [True, False, False]
    assert len(list((tmp_path / "files").iterdir())) == 3
    assert make_trainer(tmp_path, TRAKCallback(tmp_path / "store")).attribute(Classifier(), datamodule=Blobs())
    assert all(entry.complete for entry in store)


def test_parts_of_a_model_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), devices=2, strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match=r"whole model.*ModelParallelStrategy.*consolidated.*ckpt_path"):
        TRAKCallback.setup(trainer.callbacks[0], trainer, Classifier(), "fit")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"proj_dim": 0}, ValueError),
        ({"proj_dim": 1.5}, ValueError),
        ({"projector": "gaussian"}, ValueError),
        ({"projector": 3}, TypeError),
        ({"gradients": "backpack"}, ValueError),
        ({"featurize_on": "epoch"}, ValueError),
        ({"damping": -1}, ValueError),
        ({"damping": float("nan")}, ValueError),
        ({"curvature": "yes"}, TypeError),
        ({"seed": 0.5}, TypeError),
        ({"batch_size": 0}, ValueError),
        ({"parameters": Classifier().parameters()}, TypeError),
        ({"parameters": 3}, TypeError),
    ],
)
def test_arguments_are_checked_at_once(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        TRAKCallback("store", **arguments)


def test_unknown_parameter_pattern(tmp_path):
    with pytest.raises(ValueError, match=r"parameters='net.9.*' matches no parameter.*'net.4.weight'"):
        fit(tmp_path, TRAKCallback(tmp_path / "store", parameters="net.9.weight"))


def test_without_a_checkpoint_the_final_weights_are_featurized_as_is_said_at_the_start(tmp_path, said):
    trainer, module = fit(tmp_path, TRAKCallback(tmp_path / "store"), enable_checkpointing=False)
    assert sum("no ModelCheckpoint" in message for message in said()) == 1
    store = FeatureStore(tmp_path / "store")
    assert store.digests == [weights_digest(module.state_dict())]
    assert store[store.digests[0]].complete
    assert (store[store.digests[0]].meta["epoch"], store[store.digests[0]].meta["global_step"]) == (3, 15)
    assert trainer.attribute().scores.shape == (40, 7)


def test_a_model_checkpoint_that_never_saves_is_made_up_for(tmp_path):
    never = ModelCheckpoint(tmp_path / "files", every_n_epochs=100, save_top_k=-1)
    _, module = fit(tmp_path, TRAKCallback(tmp_path / "store"), never)
    assert FeatureStore(tmp_path / "store").digests == [weights_digest(module.state_dict())]


def test_after_a_fast_dev_run_attribute_says_that_there_is_nothing(tmp_path):
    trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store"), fast_dev_run=True)
    with pytest.raises(MisconfigurationException, match=r"ran with fast_dev_run.*ckpt_path"):
        trainer.attribute()


def test_another_process_that_takes_the_store_away_does_not_end_training(tmp_path, said):
    class Taken(Classifier):
        def on_train_end(self):
            shutil.rmtree(tmp_path / "store" / "checkpoints")

    with pytest.warns(UserWarning, match=r"Training goes on\. trainer\.attribute"):
        trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store", featurize_on="fit_end"), module=Taken())
    assert trainer.global_step == 15
    assert not any("average over" in line for line in said())  # there is nothing to average over


def test_a_store_that_cannot_take_weights_does_not_end_training(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_trak.store.store.save_weights", full)
    with pytest.warns(
        UserWarning, match=r"could not be put into the feature store: OSError.*goes on from it\. Training goes on\."
    ) as caught:
        trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path))
    assert sum("feature store" in str(warning.message) for warning in caught) == 1
    assert (trainer.global_step, len(list((tmp_path / "files").iterdir()))) == (15, 3)
    monkeypatch.undo()
    paths = sorted((tmp_path / "files").iterdir())
    assert trainer.attribute(ckpt_path=paths).scores.shape == (40, 7)  # as is advised


def test_weights_that_are_changed_for_good_end_training(tmp_path):
    class Meddles(Classifier):
        def model_output(self, batch):
            if self.trainer.global_step:
                with torch.no_grad():
                    self.kept[0].add_(1)
            return super().model_output(batch)

    module = Meddles()
    module.__dict__["kept"] = (module.net[0].weight,)  # in a list it would be the checkpoint's
    with pytest.raises(ModuleChanged, match=r"net\.0\.weight has other values"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), module=module)


def test_runs_that_are_pooled_are_told_of_and_can_be_left_behind(tmp_path, said):
    fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path / "a"))
    assert said()[-1].endswith(f"average over 3 checkpoints in '{tmp_path / 'store'}', from 1 run.")
    trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path / "b"), seed=1)
    assert "average over 6 checkpoints" in said()[-1]
    assert "from 2 runs (with those of earlier runs; TRAKCallback(overwrite=True) deletes them)." in said()[-1]
    assert trainer.attribute().status.startswith("6 checkpoints of 2 runs, ")
    assert said()[-1].startswith("TRAKCallback: 6 checkpoints of 2 runs, ")

    (tmp_path / "store" / "notes.txt").write_text("of the user")
    anew = TRAKCallback(tmp_path / "store", overwrite=True, proj_dim=8, projector="sparse")
    trainer, _ = fit(tmp_path, anew, every_epoch(tmp_path / "c"), seed=2)
    store = FeatureStore(tmp_path / "store")
    assert set(store.digests) == set(digests_of(*(tmp_path / "c" / "files").iterdir()))
    assert store.manifest["projection"]["proj_dim"] == 8
    assert (tmp_path / "store" / "notes.txt").exists()


def test_a_resumed_run_is_the_same_run_and_is_not_overwritten(tmp_path):
    fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path), max_epochs=2)
    last = max((tmp_path / "files").iterdir(), key=read_checkpoint_step)
    trak = TRAKCallback(tmp_path / "store", overwrite=True)
    fit(tmp_path, trak, every_epoch(tmp_path), max_epochs=4, ckpt_path=last)
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 4
    assert len({store[digest].meta["run"] for digest in store.digests}) == 1


class Finetuning(Classifier):
    """A backbone that Lightning's own callback freezes, and unfreezes later."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net[:4], self.net[4]

    def configure_optimizers(self):
        return torch.optim.SGD([value for value in self.parameters() if value.requires_grad], lr=0.05)


def test_parameters_that_a_callback_unfreezes_later_are_attributed(tmp_path):
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)
    with pytest.warns(UserWarning, match=r"2 of 6 parameters are frozen now, and BackboneFinetuning may unfreeze them"):
        trainer, module = fit(tmp_path, finetuning, TRAKCallback(tmp_path / "store"), module=Finetuning())
    names = [name for name, _ in module.named_parameters()]
    assert list(FeatureStore(tmp_path / "store").manifest["parameters"]) == names
    assert trainer.attribute().scores.shape == (40, 7)


def test_parameters_that_were_chosen_stay_chosen(tmp_path):
    finetuning, trak = (
        BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False),
        TRAKCallback(tmp_path / "s", parameters="net.4.*"),
    )
    fit(tmp_path, finetuning, trak, module=Finetuning())  # warnings are errors
    assert list(FeatureStore(tmp_path / "s").manifest["parameters"]) == ["net.4.weight", "net.4.bias"]


def test_parameters_that_are_unfrozen_by_hand_are_told_of_once(tmp_path):
    class ByHand(Classifier):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

    with pytest.warns(UserWarning, match=r"2 parameters are trained by now.*net\.0\.weight.*parameters='\*'") as caught:
        fit(tmp_path, TRAKCallback(tmp_path / "store"), module=ByHand())
    assert sum("trained by now" in str(warning.message) for warning in caught) == 1


def test_parameters_that_are_unfrozen_one_after_the_other_are_told_of_once(tmp_path):
    class Gradually(Classifier):
        def __init__(self):
            super().__init__()
            self.net[:2].requires_grad_(False)

        def on_train_epoch_start(self):
            for place in range(2):
                self.net[place].requires_grad_(self.current_epoch > place)

    with pytest.warns(
        UserWarning, match=r"2 parameters are trained by now.*nor are any that are unfrozen later"
    ) as caught:
        fit(tmp_path, TRAKCallback(tmp_path / "store"), module=Gradually(), max_epochs=4)
    assert sum("trained by now" in str(warning.message) for warning in caught) == 1


class SavesSomethingElse(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        for number, content in enumerate(({"state_dict": {}}, {"notes": "of my own"})):
            trainer.strategy.checkpoint_io.save_checkpoint(content, f"{trainer.default_root_dir}/{number}.ckpt")


def test_files_that_are_no_checkpoints_are_passed_over(tmp_path):
    trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path), SavesSomethingElse())
    assert trainer.state.finished
    assert len(FeatureStore(tmp_path / "store")) == trainer.max_epochs


class UnfreezesLate(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            pl_module.requires_grad_(True)


def test_parameters_that_are_unfrozen_within_the_only_epoch_are_told_of(tmp_path):
    module = Classifier()
    module.net[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="parameters are trained by now that were frozen"):
        fit(tmp_path, TRAKCallback(tmp_path / "store"), UnfreezesLate(), module=module, max_epochs=1)


class ScaledOutput(Classifier):
    scale = 1.0

    def model_output(self, batch):
        return self.scale * super().model_output(batch)


def test_half_of_the_features_of_one_model_are_not_completed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_trak.trainer.featurizing.plan.rows_in_a_chunk", lambda *_: 8)
    module, data = ScaledOutput(), Blobs()
    trak = TRAKCallback(tmp_path / "store", batch_size=8)
    trainer, _ = fit(tmp_path, trak, every_epoch(tmp_path), module=module, data=Blobs(), max_epochs=1)
    (entry,) = FeatureStore(tmp_path / "store")
    for start in (16, 24, 32):
        entry.train.path(start).unlink()
    module.scale = 10.0
    with pytest.raises(ValueError, match="stored features of train rows .* are not those that the model"):
        trainer.attribute(module, datamodule=data)
    module.scale = 1.0
    trainer.attribute(module, datamodule=data)
    assert FeatureStore(tmp_path / "store")[entry.digest].complete


def test_what_another_process_computes_with_another_model_meanwhile_is_noticed(tmp_path, monkeypatch):
    """Each of two processes begins with an empty checkpoint, so neither finds anything to compare."""
    monkeypatch.setattr("lightning_trak.trainer.featurizing.plan.rows_in_a_chunk", lambda *_: 8)
    module, data = ScaledOutput(), Blobs()
    trak = TRAKCallback(tmp_path / "store", batch_size=8)
    trainer, _ = fit(tmp_path, trak, every_epoch(tmp_path), module=module, data=Blobs(), max_epochs=1)
    (entry,) = FeatureStore(tmp_path / "store")

    def empty():
        for rows in entry.train.all():
            entry.train.path(rows.start).unlink()

    empty()
    module.scale = 10.0
    trainer.attribute(module, datamodule=data)
    others = entry.train.path(32).read_bytes()
    empty()
    own = module.model_output

    def model_output(batch):
        if entry.train.path(0).exists():  # the other process has finished a chunk
            entry.train.path(32).write_bytes(others)
        return own(batch)

    module.scale, module.model_output = 1.0, model_output
    with pytest.raises(ValueError, match=r"stored features of train rows \[32"):
        trainer.attribute(module, datamodule=data)


@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.parametrize("featurize_on", ["save", "fit_end"])
def test_a_resumed_run_brings_its_store_in_line_with_its_files(tmp_path, featurize_on, epochs):
    """As after a kill between a checkpoint file and the store; also if training had ended by then."""

    def run(max_epochs, ckpt_path=None):
        trak, files = TRAKCallback(tmp_path / "store", featurize_on=featurize_on), every_epoch(tmp_path)
        return fit(tmp_path, trak, files, max_epochs=max_epochs, ckpt_path=ckpt_path)

    run(2)
    store, files = FeatureStore(tmp_path / "store"), sorted((tmp_path / "files").iterdir())
    lost, kept = (weights_digest(read_weights(path)) for path in files)
    assert sorted(store.digests) == sorted([lost, kept])
    training_time = store[lost].meta["training_time"]
    store.discard(lost)
    for rows in store[kept].train.all():
        store[kept].train.path(rows.start).unlink()
    gone = store.add("f" * 32, {**store[kept].meta, "digest": "f" * 32}, read_weights(files[1]))
    assert gone.meta["run"] == store[kept].meta["run"]
    gone.path.joinpath("weights.safetensors").write_bytes(store[kept].weights_path.read_bytes())
    if featurize_on == "save":
        store.discard(gone.digest)  # else it was deleted by Lightning, and not yet from the store
    run(epochs, files[-1])
    assert lost in store
    assert kept in store
    assert gone.digest not in store
    assert len(store) == epochs
    assert all(entry.complete for entry in store)
    assert store[lost].meta["training_time"] == training_time


def test_a_signal_to_terminate_ends_featurization_after_the_batch(tmp_path, monkeypatch):
    """What is done is kept, and training is not taken for finished."""
    monkeypatch.setattr("lightning_trak.trainer.featurizing.plan.rows_in_a_chunk", lambda *_: 8)

    class Terminated(Classifier):
        batches = 0

        def model_output(self, batch):
            if self.trainer.global_step:
                self.batches += 1
                if self.batches == 6:  # a few trials, and batches of four
                    os.kill(os.getpid(), signal.SIGTERM)
                assert self.batches < 9
            return super().model_output(batch)

    module = Terminated()
    with pytest.raises(SystemExit):
        fit(tmp_path, TRAKCallback(tmp_path / "store", batch_size=4), every_epoch(tmp_path), module=module)
    (entry,) = FeatureStore(tmp_path / "store")
    assert 0 < len(entry.train.present()) < len(entry.train.all())
    assert not [path for path in entry.train.folder.iterdir() if path.name.endswith(".lock")]
    trainer, _ = fit(tmp_path, TRAKCallback(tmp_path / "store"), every_epoch(tmp_path))
    assert trainer.attribute().scores.shape == (40, 7)
    assert entry.complete
