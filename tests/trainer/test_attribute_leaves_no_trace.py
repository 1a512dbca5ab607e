"""attribute leaves trainer, model, data and random states as they were."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAKCallback
from tests.conftest import Blobs, Classifier, make_data, make_trainer
from tests.trainer.references import fresh


def snapshot(trainer, module):
    """Everything of model, trainer and callbacks that a user could notice."""
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "data pointers": [parameter.data_ptr() for parameter in module.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "modes": [submodule.training for submodule in module.modules()],
        "module trainer": module._trainer,
        "device": module.device,
        "callbacks": list(trainer.callbacks),
        "lightning_module": trainer.lightning_module,
        "strategy model": trainer.strategy.model,
        "state": (trainer.state.fn, trainer.state.status, trainer.state.stage),
        "datamodule": trainer.datamodule,
        "train_dataloader": trainer.train_dataloader,
        "predict source": trainer.predict_loop._data_source.instance,
        "selector": trainer._data_connector._datahook_selector,
        "best": trainer.checkpoint_callback.best_model_path,
        "global_step": trainer.global_step,
        "metrics": dict(trainer.callback_metrics),
        "rng": (torch.get_rng_state(), np.random.get_state()[1].copy()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one is other or one == other


def prepared(run):
    """The run's model in an odd state: some gradients, mixed modes, a frozen parameter."""
    module = run[2]
    module.train()
    module.net[1].eval()
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    module.net[4].bias.requires_grad_(False)
    return module


def test_attribute_leaves_everything_as_it_was(run):
    _, trainer, _, _ = run
    module = prepared(run)
    before = snapshot(trainer, module)
    trainer.attribute()
    assert_same(before, snapshot(trainer, module))
    module.net[4].bias.requires_grad_(True)


def test_attribute_leaves_everything_as_it_was_after_an_error_too(run, monkeypatch):
    _, trainer, _, _ = run
    module = prepared(run)
    before = snapshot(trainer, module)

    def fails(*_, **__):
        torch.rand(3)
        raise RuntimeError("in the middle")

    monkeypatch.setattr("lightning_trak.trainer.featurizing.featurization.Featurizer.__call__", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.attribute()
    assert_same(before, snapshot(trainer, module))
    module.net[4].bias.requires_grad_(True)


def test_another_model_or_datamodule_does_not_stay_attached(run):
    root, trainer, module, _ = run
    other, data = Classifier(), Blobs()
    before = snapshot(trainer, module)
    trainer.attribute(other, datamodule=data)
    assert_same(before, snapshot(trainer, module))
    assert other._trainer is None
    assert data.trainer is None
    untouched = fresh(root)
    untouched.attribute(other, datamodule=data)
    assert untouched.lightning_module is None
    assert untouched.datamodule is None


def test_training_goes_on_after_attribute_as_without(tmp_path):
    def train(attributes):
        L.seed_everything(0, verbose=False)
        root = tmp_path / str(attributes)
        trainer = make_trainer(root, TRAKCallback(root / "store"), max_epochs=1)
        module, data = Classifier(), Blobs()
        trainer.fit(module, datamodule=data)
        if attributes:
            trainer.attribute()
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, datamodule=data)
        return module.state_dict()

    for one, other in zip(train(False).values(), train(True).values(), strict=True):
        assert torch.equal(one, other)


def test_results_do_not_depend_on_how_data_are_read(tmp_path, run):
    root, trainer, _, _ = run
    expected = trainer.attribute().scores
    files = sorted((root / "files").iterdir())
    for number, (options, data) in enumerate(
        [
            ({"inference_mode": False}, Blobs()),
            ({}, Blobs(batch_size=40)),
            ({}, Blobs(batch_size=1)),
            ({}, Blobs(num_workers=2)),
        ]
    ):
        store = tmp_path / str(number)
        for batch_size in (None, 3):
            again = make_trainer(store, TRAKCallback(store / str(batch_size), batch_size=batch_size), **options)
            scores = again.attribute(Classifier(), datamodule=data, ckpt_path=files).scores
            torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)
    shuffled = DataLoader(make_data(7, 2), 2, shuffle=True)
    torch.testing.assert_close(trainer.attribute(dataloaders=shuffled).scores, expected, rtol=1e-3, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(trainer.attribute().scores, expected, rtol=1e-3, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(trainer.attribute().scores, expected, rtol=1e-3, atol=1e-5)
