"""The loss of the first batch, by output_to_loss and by training_step: told apart, and left without a trace."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Attribution, ClassificationMixin, RegressionMixin, TRAKCallback

DATA = TensorDataset(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3)


class Classifier(ClassificationMixin, L.LightningModule):
    """With Dropout and BatchNorm, so that the loss in training is another than in evaluation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.6), torch.nn.Linear(16, 3)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Summed(Classifier):
    def training_step(self, batch, batch_idx):
        return {"loss": 8 * super().training_step(batch, batch_idx)}


class Squared(Classifier):
    def output_to_loss(self, output, batch):
        return output.square()


def fit(root, module, watched=True, data=None, **options):
    torch.manual_seed(1)
    trainer = L.Trainer(
        default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[TRAKCallback(root / "trak")] if watched else [], **{"max_epochs": 1, **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, 8, shuffle=True) if data is None else None, datamodule=data)
    return module


def assert_fits_without_a_word(root, module, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = fit(root, module, **options)
    messages = [str(warning.message) for warning in caught]
    assert not [message for message in messages if "loss" in message or "batch was changed" in message]
    assert fitted.trainer.state.finished


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_the_same_loss_passes_without_a_word(tmp_path, options):
    assert_fits_without_a_word(tmp_path, Classifier(), **options)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
@pytest.mark.parametrize("kind", [Summed, Squared])
def test_another_loss_is_named_with_both_values(tmp_path, kind, options):
    with pytest.warns(UserWarning, match="training_step returned a loss of") as caught:
        fit(tmp_path, kind(), **options)
    message = next(str(warning.message) for warning in caught if "training_step" in str(warning.message))
    words = message.replace(",", "").split()
    values = [float(words[words.index("of") + 1]), float(words[words.index("is") + 1])]
    if kind is Summed:  # Dropout drew the same
        assert values[0] == pytest.approx(8 * values[1], rel=1e-3)
    assert "output_to_loss" in message


def test_nothing_is_left_behind(tmp_path):
    with pytest.warns(UserWarning, match="training_step"):
        watched = fit(tmp_path / "watched", Summed())
    alone = fit(tmp_path / "alone", Summed(), watched=False)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_manual_optimization_is_not_compared(tmp_path):
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(8 * super().training_step(batch, batch_idx))
            self.optimizers().step()

    assert_fits_without_a_word(tmp_path, Manual())


def test_a_module_that_tells_no_loss_is_not_compared(tmp_path):
    class OnlyQ(L.LightningModule):
        """Defines Q and w, and no loss."""

        def __init__(self):
            super().__init__()
            self.inner = Classifier()

        def model_output(self, batch):
            return self.inner.model_output(batch)

        def out_to_loss_grad(self, batch):
            return self.inner.out_to_loss_grad(batch)

        def out_to_loss_curvature(self, batch):
            return self.inner.out_to_loss_curvature(batch)

        def training_step(self, batch, batch_idx):
            return 8 * self.inner.training_step(batch, batch_idx)

        def configure_optimizers(self):
            return self.inner.configure_optimizers()

    assert_fits_without_a_word(tmp_path, OnlyQ())


class Unlabelled(Classifier):
    """Trains on other labels than it tells; at first any labels have the same loss."""

    def __init__(self):
        super().__init__()
        torch.nn.init.zeros_(self.net[3].weight)
        torch.nn.init.zeros_(self.net[3].bias)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), torch.zeros_like(batch[1]))


def test_a_difference_that_shows_later_is_seen_in_the_second_epoch(tmp_path):
    fit(tmp_path / "one", Unlabelled())
    with pytest.warns(UserWarning, match="training_step returned a loss of"):
        fit(tmp_path / "two", Unlabelled(), max_epochs=2)


class Elsewhere(Classifier):
    """Has a loss of its own for each example, and Dropout before and in it."""

    def per_sample_loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("seed", range(4))
def test_losses_of_ones_own_draw_the_same(tmp_path, seed):
    torch.manual_seed(seed)
    assert_fits_without_a_word(tmp_path, Elsewhere())


class Mixed(L.LightningDataModule):
    """Training batches are combined of two, which model_output does not take."""

    def train_dataloader(self):
        return CombinedLoader({"one": DataLoader(DATA, 8), "other": DataLoader(DATA, 8)}, "min_size")

    def featurize_dataloader(self):
        return DataLoader(DATA, 8)


class MixedClassifier(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["one"], batch_idx)


def test_batches_of_training_that_cannot_be_told_are_no_reason_to_stop(tmp_path):
    with pytest.warns(UserWarning, match="cannot be compared with that of MixedClassifier's own methods: TypeError"):
        fit(tmp_path, MixedClassifier(), data=Mixed())


class Unscale(torch.nn.Module):
    """Scales predictions back in evaluation mode, as chemprop does."""

    def forward(self, x):
        return x if self.training else 20 * x + 5


class Scaled(RegressionMixin, L.LightningModule):
    """Trains on scaled labels, and predicts unscaled ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1), Unscale())

    def forward(self, x):
        return self.net(x)[:, 0]

    def get_labels(self, batch):
        return batch[1].float()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), self.get_labels(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_another_loss_in_evaluation_mode_is_named_with_what_makes_the_difference(tmp_path):
    with pytest.warns(UserWarning, match="Unscale computes something else in evaluation mode") as caught:
        fit(tmp_path / "watched", Scaled())
    message = next(str(warning.message) for warning in caught if "Unscale" in str(warning.message))
    assert "Scaled's own methods" in message
    assert "Dropout computes" not in message
    module, batch = Scaled().eval(), (DATA.tensors[0], DATA.tensors[1])
    evaluation = F.mse_loss(module(batch[0]), module.get_labels(batch)).item()
    told = float(message.split("the first batch is ")[1].split(",")[0])
    assert told == pytest.approx(evaluation, rel=0.5)  # of other examples of the same kind
    module = Scaled()
    module.net[3].register_forward_hook(lambda *_: None)
    alone, watched = fit(tmp_path / "a", Scaled(), watched=False), Scaled()
    with pytest.warns(UserWarning, match="Unscale"):
        fit(tmp_path / "b", watched)
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), watched.parameters(), strict=True))


class Noisy(Classifier):
    """Draws by itself in training mode: that is no other loss, but chance."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.3, self.training))


@pytest.mark.parametrize("seed", range(5))
def test_chance_of_ones_own_is_no_difference_of_modes(tmp_path, seed):
    torch.manual_seed(seed)
    assert_fits_without_a_word(tmp_path, Noisy(), max_epochs=2)


class Mixes(L.Callback):
    """Changes the batch in place, without a trace in the loss."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch[0].add_(1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_batches_that_another_callback_changes_are_told_of_in_either_order(tmp_path, first):
    trak = TRAKCallback(tmp_path / "trak")
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=3,
        enable_model_summary=False, callbacks=[trak, Mixes()] if first else [Mixes(), trak],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="A batch was changed between the loader and") as caught:
        trainer.fit(Classifier(), DataLoader(DATA, 8, shuffle=True))
    assert sum("batch was changed" in str(warning.message) for warning in caught) == 1  # once, though of two epochs


class MixesLate(L.Callback):
    """Changes batches in place, or puts others in their place, but not the first."""

    def __init__(self, in_place):
        self.in_place = in_place

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step > 3:
            if self.in_place:
                batch[0].mul_(2)
            else:
                batch[0] = 2 * batch[0]


@pytest.mark.parametrize("in_place", [True, False])
def test_batches_that_are_changed_later_are_told_of_too(tmp_path, in_place):
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=3,
        enable_model_summary=False, callbacks=[TRAKCallback(tmp_path / "trak"), MixesLate(in_place)],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="A batch was changed between the loader and") as caught:
        trainer.fit(Classifier(), DataLoader(DATA, 4, shuffle=True))
    assert sum("batch was changed" in str(warning.message) for warning in caught) == 1


def test_a_model_output_that_changes_its_batch_is_named(tmp_path):
    class Spoils(Classifier):
        def model_output(self, batch):
            output = super().model_output((batch[0].clone(), batch[1]))
            batch[0].zero_()
            return output

    with pytest.raises(
        ValueError, match=r"changes its batch in place \(list\(Tensor\(8, 3\), Tensor\(8,\)\), tensor 1\)"
    ):
        fit(tmp_path, Spoils())


def test_scores_know_what_was_warned_of(tmp_path):
    module = Squared()
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=2,
        enable_model_summary=False, callbacks=[TRAKCallback(tmp_path / "trak")],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="returned a loss of") as caught:
        trainer.fit(module, DataLoader(DATA, 8))
    (said,) = {str(one.message) for one in caught if "returned a loss of" in str(one.message)}
    attribution = trainer.attribute(dataloaders=DataLoader(DATA, 8))
    assert attribution.info.warnings == (said,)
    attribution.save(tmp_path / "saved")
    assert Attribution.load(tmp_path / "saved").info == attribution.info
