"""How long training went on: against sums by hand, over resumed runs, and in checkpoints of all kinds."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import ClassificationMixin, FeatureStore, TRAKCallback
from lightning_trak.influence import TrainingTime
from lightning_trak.store.weights import read_checkpoint

STEPS = 4  # in an epoch


class Classifier(ClassificationMixin, L.LightningModule):
    """Linear; its optimizer is given."""

    def __init__(self, optimizer, schedule=None):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.optimizer, self.schedule = optimizer, schedule

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sgd(**options):
    return lambda parameters: torch.optim.SGD(parameters, **options)


def fit(root, module, epochs=2, watched=True, ckpt_path=None, **options):
    """Train; return the checkpoint files in order."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, generator=generator), torch.arange(16) % 2)
    callbacks = [ModelCheckpoint(root / "files", save_top_k=-1, filename="{epoch}")]
    trainer = L.Trainer(
        default_root_dir=root, max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks, TRAKCallback(root / "trak")] if watched else callbacks,
        **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 16 // STEPS), ckpt_path=ckpt_path)
    return sorted((root / "files").iterdir())


def in_store(root):
    store = FeatureStore(root / "trak")
    return [store[digest].meta["training_time"] for digest in store.digests]


def in_file(path):
    return TrainingTime.of_checkpoint(read_checkpoint(path))


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"lr": 0.1}, 0.1),
        ({"lr": 0.1, "momentum": 0.9}, 1.0),
        ({"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, 1.0),
        ({"lr": 0.1, "momentum": 0.5, "dampening": 0.5}, 0.1),
    ],
)
def test_a_step_takes_the_learning_rate_over_one_minus_momentum(tmp_path, options, step):
    files = fit(tmp_path, Classifier(sgd(**options)))
    decay = options.get("weight_decay", 0.0)
    for epoch, (file, stored) in enumerate(zip(files, in_store(tmp_path), strict=True), 1):
        assert stored == pytest.approx({"time": epoch * STEPS * step, "steps": epoch * STEPS, "weight_decay": decay})
        assert vars(in_file(file)) == pytest.approx(stored)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradient_flow_goes_as_far_in_that_time(momentum):
    """Against the closed form on a quadratic, exp(−t s), with steps that are small."""
    x, s = torch.tensor([1.0], dtype=torch.float64, requires_grad=True), 0.7
    optimizer, training = torch.optim.SGD([x], lr=1e-4, momentum=momentum), TrainingTime()
    for _ in range(2000):
        optimizer.zero_grad()
        (s * x.square() / 2).sum().backward()
        optimizer.step()
        training = training.after_step(optimizer)
    assert x.item() == pytest.approx(torch.exp(torch.tensor(-training.time * s)).item(), rel=0.02)


def test_schedules_count_as_they_were(tmp_path):
    fit(tmp_path, Classifier(sgd(lr=1.0), schedule=lambda step: 1 / (step + 1)))
    assert [stored["time"] for stored in in_store(tmp_path)] == pytest.approx(
        [sum(1 / (step + 1) for step in range(steps)) for steps in (STEPS, 2 * STEPS)]
    )


def test_gradients_that_are_accumulated_make_one_step(tmp_path):
    fit(tmp_path, Classifier(sgd(lr=1.0)), epochs=1, accumulate_grad_batches=2)
    assert in_store(tmp_path)[-1]["time"] == STEPS / 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_goes_on(tmp_path):
    def module():
        return Classifier(sgd(lr=1.0), schedule=lambda step: 1 / (step + 1))

    fit(tmp_path / "whole", module(), epochs=3)
    file = fit(tmp_path / "first", module(), epochs=1)[-1]
    fit(tmp_path / "second", module(), epochs=3, ckpt_path=file)
    assert in_store(tmp_path / "second")[-1] == pytest.approx(in_store(tmp_path / "whole")[-1])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_may_go_on_without_the_callback(tmp_path):
    """Lightning does not ask for it, which would be a warning."""
    file = fit(tmp_path / "first", Classifier(sgd(lr=1.0)), epochs=1)[-1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        files = fit(tmp_path / "second", Classifier(sgd(lr=1.0)), watched=False, ckpt_path=file)
    assert not [warning for warning in caught if "TRAKCallback" in str(warning.message)]
    assert files[-1] != file


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumed_from_a_file_that_says_nothing_is_unknown(tmp_path):
    file = fit(tmp_path / "first", Classifier(sgd(lr=1.0)), epochs=1, watched=False)[-1]
    fit(tmp_path / "second", Classifier(sgd(lr=1.0)), ckpt_path=file)
    assert in_store(tmp_path / "second")[-1] is None


def test_a_second_run_with_the_same_callback_begins_anew(tmp_path):
    trak = TRAKCallback(tmp_path / "trak")
    data = DataLoader(TensorDataset(torch.randn(16, 3), torch.arange(16) % 2), 16 // STEPS)
    for seed in range(2):
        torch.manual_seed(seed)
        trainer = L.Trainer(
            default_root_dir=tmp_path / str(seed), max_epochs=1, accelerator="cpu", logger=False, callbacks=[trak],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Classifier(sgd(lr=1.0)), data)
    assert [stored["time"] for stored in in_store(tmp_path)] == [STEPS, STEPS]


def test_unwatched_files_are_reckoned_from_rate_and_step(tmp_path):
    files = fit(tmp_path, Classifier(sgd(lr=0.1, momentum=0.9)), watched=False)
    assert [in_file(file).time for file in files] == pytest.approx([STEPS, 2 * STEPS])


def test_unwatched_files_of_a_schedule_are_unknown(tmp_path):
    files = fit(tmp_path, Classifier(sgd(lr=1.0), schedule=lambda step: 1 / (step + 1)), watched=False)
    assert in_file(files[-1]) is None


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_optimizers_are_unknown(tmp_path, optimizer, watched):
    files = fit(tmp_path, Classifier(lambda parameters: optimizer(parameters, lr=0.01)), epochs=1, watched=watched)
    assert in_file(files[-1]) is None


def groups(*options, **defaults):
    weights = [torch.zeros(1, requires_grad=True) for _ in options]
    for weight in weights:
        weight.grad = torch.ones(1)
    own = [{"params": [weight], **option} for weight, option in zip(weights, options, strict=True)]
    return torch.optim.SGD(own, **defaults)


def test_groups_with_rates_or_decays_of_their_own_are_unknown():
    assert TrainingTime().after_step(groups({"lr": 0.1}, {}, lr=0.2)) is None
    assert TrainingTime().after_step(groups({"weight_decay": 0.5}, {"weight_decay": 1.0}, lr=0.2)) is None
    assert TrainingTime().after_step(groups({"weight_decay": 0.5}, {}, lr=0.2)) == TrainingTime(0.2, 1, 0.5)
    assert TrainingTime().after_step(groups({}, lr=torch.tensor(0.25))) == TrainingTime(0.25, 1)
    assert TrainingTime().after_step(groups({}, lr=0.1, momentum=1.0)) is None
    assert TrainingTime().after_step(groups({}, lr=0.1, maximize=True)) is None


class SignSGD(torch.optim.SGD):
    """Has SGD's options, and steps of another kind."""


def test_optimizers_derived_from_sgd_are_unknown(tmp_path):
    fit(tmp_path, Classifier(lambda parameters: SignSGD(parameters, lr=0.1)), epochs=1)
    assert in_store(tmp_path)[-1] is None


def test_an_optimizer_with_more_options_than_sgd_is_unknown():
    optimizer = groups({}, lr=0.1)
    state = {"optimizer_states": [optimizer.state_dict()], "global_step": 3, "lr_schedulers": []}
    assert TrainingTime.of_checkpoint(state) == TrainingTime(pytest.approx(0.3), 3)
    state["optimizer_states"][0]["param_groups"][0]["trust_coefficient"] = 0.001
    assert TrainingTime.of_checkpoint(state) is None


def test_clipped_gradients_are_unknown(tmp_path):
    fit(tmp_path, Classifier(sgd(lr=0.1)), epochs=1, gradient_clip_val=0.1)
    assert in_store(tmp_path)[-1] is None


def test_steps_without_gradients_go_nowhere(tmp_path):
    class EverySecond(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    with pytest.warns(UserWarning, match="returned `None`"):
        fit(tmp_path, EverySecond(sgd(lr=1.0)), epochs=1)
    assert in_store(tmp_path)[-1]["time"] == STEPS / 2


@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization(tmp_path, optimizers):
    class Manual(Classifier):
        def __init__(self):
            super().__init__(None)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers() if optimizers > 1 else [self.optimizers()]:
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.5) for _ in range(optimizers)]

    fit(tmp_path, Manual(), epochs=1)
    assert (in_store(tmp_path)[-1] or {}).get("time") == (0.5 * STEPS if optimizers == 1 else None)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_time_of_another_run_is_not_taken_over(tmp_path):
    """A callback that watched one run, used again to go on from a file of another that does not say."""
    file = fit(tmp_path / "unwatched", Classifier(sgd(lr=0.5)), epochs=1, watched=False)[-1]
    trak = TRAKCallback(tmp_path / "trak")
    data = DataLoader(TensorDataset(torch.randn(16, 3), torch.arange(16) % 2), 16 // STEPS)
    for epochs, ckpt_path in ((3, None), (2, file)):
        trainer = L.Trainer(
            default_root_dir=tmp_path / str(epochs), max_epochs=epochs, accelerator="cpu", logger=False,
            callbacks=[trak], enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Classifier(sgd(lr=1.0)), data, ckpt_path=ckpt_path)
    *first, second = in_store(tmp_path)
    assert [stored["time"] for stored in first] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert second is None


def test_derived_callbacks_keep_it_too(tmp_path):
    class Derived(TRAKCallback):
        pass

    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, callbacks=[Derived(tmp_path / "t")],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.randn(16, 3), torch.arange(16) % 2), 16 // STEPS)
    trainer.fit(Classifier(sgd(lr=1.0), schedule=lambda step: 1 / (step + 1)), data)
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    assert in_file(tmp_path / "file.ckpt").time == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 / 4)


def test_mere_weights_are_unknown():
    assert TrainingTime.of_checkpoint({"state_dict": {}}) is None
