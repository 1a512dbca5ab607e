"""attribution.parts(i, j): scores split by layer and by parts, against float64 loops, and against the scores."""

from __future__ import annotations

import copy

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Attribution, FeatureStore, MultilabelMixin, RegressionMixin, SegmentationMixin, TRAKCallback
from lightning_trak.curvature import Curvature
from lightning_trak.gradients import DenseGradient
from lightning_trak.store.weights import load_weights
from tests.conftest import Blobs, Classifier, make_trainer
from tests.trainer.featurizing.test_whitening import WHOLE, N, OwnOutput, Texts, fitted, tokens
from tests.trainer.references import features_float64

I, J = 7, 2  # noqa: E741 - a training example and a target


def shares_float64(module, curvature, words):
    """Slow and obvious: a token, a backward pass, a parameter at a time. Returns φ of the tokens, and q."""
    module = copy.deepcopy(module).double().eval()
    losses = nn.functional.cross_entropy(module(words[None])[0, :-1], words[1:], reduction="none")
    parameters, q = list(module.parameters()), 1 - torch.exp(-losses.mean())
    slope = -1 / q / len(losses)  # f = log(p / (1 − p)), p = exp(−mean), so ∂f/∂mean = −1 / (1 − p)
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(slope.detach() * loss, parameters, retain_graph=True)
        parts = []
        for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
            values = curvature.eigenvalues[name].double()
            rotated = curvature.bases[name].rotate(DenseGradient(gradient[None].float()))[0].double()
            parts.append(rotated / (values + values.mean()).sqrt())
        rows.append(torch.cat(parts).detach().numpy())
    return np.array(rows), q.item()


def test_tokens_and_layers_are_those_of_a_slow_loop(tmp_path):
    trainer, module = fitted(tmp_path, **WHOLE)
    attribution = trainer.attribute(datamodule=Texts())
    found = attribution.parts(I, J)
    store = FeatureStore(tmp_path / "store")
    tokens_of, layers_of = 0.0, {}
    for entry in store:
        module.load_state_dict(load_weights(entry.weights_path, entry.digest))
        curvature = Curvature.from_tensors({name: torch.from_numpy(x) for name, x in entry.read_whitening().items()})
        one, q = shares_float64(module, curvature, tokens(N, 0)[I][0])
        other, _ = shares_float64(module, curvature, tokens(5, 1)[J][0])
        tokens_of = tokens_of + one @ other.T * q / N / len(store)
        start = 0
        for name, value in module.named_parameters():
            own = slice(start, start := start + value.numel())
            layer = name.rpartition(".")[0] or name
            share = one[:, own].sum(0) @ other[:, own].sum(0) * q / N / len(store)
            layers_of[layer] = layers_of.get(layer, 0) + share
    np.testing.assert_allclose(found.parts, tokens_of, rtol=1e-2, atol=2e-3 * np.abs(tokens_of).max())
    assert list(found.layers) == list(layers_of)
    assert "scale" in found.layers
    np.testing.assert_allclose(list(found.layers.values()), list(layers_of.values()), rtol=1e-2, atol=1e-4)
    assert found.score == pytest.approx(attribution.scores[I, J].item(), rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"preconditioner": "none"}], ids=["whitened", "projected"])
def test_tokens_add_up_to_the_score(tmp_path, settings):
    """Also if only few entries are kept: then the tokens' entries are these."""
    trainer, _ = fitted(tmp_path, proj_dim=64, **settings)
    attribution = trainer.attribute(datamodule=Texts())
    for i, j in ((0, 0), (29, 4)):
        found, score = attribution.parts(i, j), attribution.scores[i, j].item()
        assert found.parts.shape == (5, 5)
        assert found.parts.sum().item() == pytest.approx(score, rel=0.02, abs=1e-3 * found.parts.abs().sum().item())
        assert sum(found.layers.values()) == pytest.approx(score, rel=1e-3)


class Data(L.LightningDataModule):
    """Random numbers, three an example, with labels of a given kind."""

    def __init__(self, labels):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(25, 3, generator=generator), labels(generator)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x[:20], self.y[:20]), 4)

    def test_dataloader(self):
        return DataLoader(TensorDataset(self.x[20:], self.y[20:]), 2)


class Trained(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return self.output_to_loss(self.model_output(batch), batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tags(MultilabelMixin, Trained): ...


class Numbers(RegressionMixin, Trained): ...


class Pixels(SegmentationMixin, Trained):
    def get_logits(self, batch):
        return self(batch[0]).reshape(-1, 2, 2, 1)


class OneNumber(Numbers):
    def get_predictions(self, batch):
        return self(batch[0])[:, 0]


KINDS = [
    (Tags, lambda g: torch.randint(0, 2, (25, 4), generator=g).float(), (4, 4)),
    (Numbers, lambda g: torch.randn(25, 4, generator=g), (4, 4)),
    (Pixels, lambda g: torch.randint(0, 2, (25, 2, 1), generator=g), (2, 1, 2, 1)),
    (OneNumber, lambda g: torch.randn(25, generator=g), None),
]


@pytest.mark.parametrize(("module", "labels", "shape"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_parts_of_every_mixin(tmp_path, module, labels, shape):
    L.seed_everything(0, verbose=False)
    trainer, data = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=2), Data(labels)
    trainer.fit(module(), datamodule=data)
    attribution = trainer.attribute(datamodule=data)
    found, score = attribution.parts(3, 1), attribution.scores[3, 1].item()
    assert found.layers == {"layer": pytest.approx(score, rel=1e-3)}
    assert (None if found.parts is None else found.parts.shape) == shape
    if shape:
        assert found.parts.sum().item() == pytest.approx(score, rel=0.02)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    L.seed_everything(0, verbose=False)
    trainer, module = make_trainer(root, TRAKCallback(root / "store", projector="identity"), max_epochs=2), Classifier()
    trainer.fit(module, datamodule=Blobs())
    return root, trainer, module, trainer.attribute(datamodule=Blobs())


def test_layers_of_projected_features(classes):
    """Of the training example's gradient: what is left of the score if only this layer's entries are kept."""
    root, _, module, attribution = classes
    data, names = Blobs(), [name for name, _ in module.named_parameters()]
    data.setup("fit")
    data.setup("test")
    train, targets = (loader.dataset for loader in (data.train_dataloader(), data.test_dataloader()))
    p = sum(value.numel() for value in module.parameters())
    expected, store, info = {}, FeatureStore(root / "store"), attribution.info
    for entry, damping in zip(store, info.dampings, strict=True):
        module.load_state_dict(load_weights(entry.weights_path, entry.digest))
        phi, probabilities = features_float64(module, train, names, np.eye(p))
        (target,), _ = features_float64(module, [targets[J]], names, np.eye(p))
        q = 1 / (1 + np.exp(np.log(probabilities / (1 - probabilities)) / info.temperature))
        w, q = q * (1 - q) / info.temperature**2, q / info.temperature
        h = phi.T @ (w[:, None] * phi)
        solved = np.linalg.solve(h + damping * np.trace(h) / p * np.eye(p), target)
        start = 0
        for name, value in module.named_parameters():
            own = slice(start, start := start + value.numel())
            share = phi[I, own] @ solved[own] * q[I] / len(store)
            expected[name.rpartition(".")[0]] = expected.get(name.rpartition(".")[0], 0) + share
    found = attribution.parts(I, J)
    assert found.parts is None
    assert list(found.layers) == list(expected)
    np.testing.assert_allclose(list(found.layers.values()), list(expected.values()), rtol=1e-2, atol=1e-5)


def test_layers_of_classes_that_are_whitened(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", preconditioner="kronecker"), max_epochs=2)
    trainer.fit(Classifier(), datamodule=Blobs())
    attribution = trainer.attribute(datamodule=Blobs())
    found = attribution.parts(I, J)
    assert list(found.layers) == ["net.0", "net.1", "net.4"]
    assert found.score == pytest.approx(attribution.scores[I, J].item(), rel=1e-3)


def test_an_output_of_ones_own_has_no_parts(tmp_path):
    trainer, _ = fitted(tmp_path, OwnOutput)
    assert trainer.attribute(datamodule=Texts()).parts(I, J).parts is None


def test_it_is_printed(classes):
    *_, attribution = classes
    lines = str(attribution.parts(I, J)).splitlines()
    assert lines[0].startswith("score ")
    assert sorted(line.split()[0] for line in lines[1:]) == ["net.0", "net.1", "net.4"]


def test_what_cannot_be_split(classes, tmp_path):
    *_, attribution = classes
    for pair in ((40, 0), (0, 7), (-1, 0)):
        with pytest.raises(ValueError, match="i must be a row of the train set, 0 to 39, and j a target, 0 to 6"):
            attribution.parts(*pair)
    attribution.save(tmp_path / "scores")
    with pytest.raises(AttributeError, match=r"Call parts\(...\) on what trainer.attribute"):
        Attribution.load(tmp_path / "scores").parts(0, 0)


def test_data_that_changed_are_noticed(tmp_path):
    L.seed_everything(0, verbose=False)
    trainer, data = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1), Data(KINDS[0][1])
    trainer.fit(Tags(), datamodule=data)
    attribution = trainer.attribute(datamodule=data)
    data.x[20 + J] += 1
    with pytest.raises(ValueError, match="the data or model_output have changed"):
        attribution.parts(I, J)
