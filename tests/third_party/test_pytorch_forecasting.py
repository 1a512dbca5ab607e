"""pytorch-forecasting: modules registered under two names, forwards that return named tuples, metrics as losses."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pytorch_forecasting import NBeats, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer
from pytorch_forecasting.metrics import RMSE, QuantileLoss

from lightning_trak import RegressionMixin, TRAKCallback, TRAKMixin, log_odds
from tests.third_party.training import ENGINES, Data, assert_same_training, auroc, fit

# its own constructors do what Lightning advises against
pytestmark = pytest.mark.filterwarnings("ignore:Attribute '(loss|logging_metrics)' is an instance of `nn.Module`")

N, M, PAST, FUTURE = 48, 6, 8, 3
WRONG = range(0, N, 8)


def series(n, seed, wrong=()):
    """Sines with a little noise; of some, the future has the wrong sign."""
    draw = np.random.default_rng(seed)
    time = np.arange(PAST + FUTURE)
    values = np.sin(0.8 * time + draw.uniform(0, 2 * np.pi, (n, 1))) + 0.1 * draw.normal(size=(n, len(time)))
    values[list(wrong), PAST:] *= -1
    names = np.repeat([f"{number:03}" for number in range(n)], len(time))  # they are sorted
    return pd.DataFrame({"series": names, "time": np.tile(time, n), "value": values.ravel()})


@pytest.fixture(scope="module")
def dataset():
    return TimeSeriesDataSet(
        series(N, 0, WRONG),
        time_idx="time",
        target="value",
        group_ids=["series"],
        min_encoder_length=PAST,
        max_encoder_length=PAST,
        min_prediction_length=FUTURE,
        max_prediction_length=FUTURE,
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(),
    )


@pytest.fixture(scope="module")
def data(dataset):
    targets = TimeSeriesDataSet.from_dataset(dataset, series(M, 1))
    options = {"batch_size": 12, "num_workers": 0}
    return Data(dataset.to_dataloader(train=True, **options), targets.to_dataloader(train=False, **options))


class Forecaster(RegressionMixin, NBeats):
    """Squared errors of all the steps ahead."""

    def get_predictions(self, batch):
        return self(batch[0])["prediction"].squeeze(2)

    def get_labels(self, batch):
        return batch[1][0]


def nbeats(dataset):
    options = {"widths": [16, 16], "num_blocks": [2, 1], "loss": RMSE(reduction="mean"), "weight_decay": 0.0}
    return Forecaster.from_dataset(dataset, **options)


class Transformer(TRAKMixin, TemporalFusionTransformer):
    """Its loss, that of several quantiles, is no function of one number: its log-odds are attributed."""

    def model_output(self, batch):
        inputs, (targets, _) = batch
        return log_odds(self.loss.loss(self(inputs)["prediction"], targets).mean((1, 2)))


def transformer(dataset):
    options = {"hidden_size": 16, "attention_head_size": 1, "hidden_continuous_size": 4, "learning_rate": 0.01}
    return Transformer.from_dataset(dataset, loss=QuantileLoss([0.1, 0.5, 0.9]), **options)


MODULES = [nbeats, transformer]


@pytest.mark.parametrize("build", MODULES)
def test_a_module_with_parameters_has_two_names(dataset, build):
    """Such modules lost their weights; that these are some is what the other tests here depend on."""
    module = build(dataset)
    twice = {name for name, _ in module.named_modules(remove_duplicate=False)} - set(dict(module.named_modules()))
    assert any(list(module.get_submodule(name).parameters()) for name in twice)


@pytest.mark.parametrize(
    ("build", "gradients"), [*((nbeats, engine) for engine in ENGINES), (transformer, "hooks"), (transformer, "loop")]
)
def test_training_is_the_same(tmp_path, dataset, data, build, gradients):
    assert_same_training(tmp_path, lambda: build(dataset), data, gradients, max_epochs=2)


def test_vmap_refuses_packed_sequences_before_training(tmp_path, dataset, data):
    """Lengths of sequences are read as numbers."""
    with pytest.raises(
        ValueError, match="gradients='vmap' cannot .*data-dependent control flow.* Use gradients='auto'"
    ):
        fit(tmp_path, lambda: transformer(dataset), data, TRAKCallback(gradients="vmap"), max_epochs=1)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("build", MODULES)
def test_wrong_futures_are_found(tmp_path, dataset, data, build):
    trainer = fit(tmp_path, lambda: build(dataset), data, TRAKCallback(featurize_on="fit_end"), max_epochs=10)
    assert auroc(trainer.attribute_self(), WRONG) > 0.9
    assert trainer.attribute(data).scores.shape == (N, M)
