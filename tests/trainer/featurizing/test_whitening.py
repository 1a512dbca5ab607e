"""Whitened gradients from training to scores, against a float64 loop, and what may not be mixed with them."""

from __future__ import annotations

import copy
import shutil
from contextlib import nullcontext

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Attribution, FeatureStore, LanguageModelingMixin, RegressionMixin, TRAKCallback
from lightning_trak.curvature import Curvature
from lightning_trak.gradients import DenseGradient
from lightning_trak.store.weights import load_weights
from tests.conftest import Blobs, Classifier, make_trainer
from tests.trainer.references import fresh

WORDS, LENGTH, N, M = 12, 6, 30, 5
WHOLE = {"proj_dim": 8 * 10_000}  # so that all entries are stored


def tokens(n, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, WORDS, (n, 1), generator=generator)
    noise = torch.randint(0, 2, (n, LENGTH), generator=generator)
    return TensorDataset((start + torch.arange(LENGTH) + noise) % WORDS)


class Texts(L.LightningDataModule):
    def __init__(self, n=N):
        super().__init__()
        self.n = n

    def train_dataloader(self):
        return DataLoader(tokens(self.n, 0), 8, shuffle=True)

    def test_dataloader(self):
        return DataLoader(tokens(M, 1), M)


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.words, self.middle, self.norm = nn.Embedding(WORDS, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(6, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, words):
        embedded = self.words(words)
        return self.head(self.norm(embedded + self.dropout(self.middle(embedded).relu()))) * self.scale

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])[:, :-1]
        return nn.functional.cross_entropy(logits.mT, batch[0][:, 1:])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Model(LanguageModelingMixin, Plain): ...


class OwnOutput(Model):
    def model_output(self, batch):
        return super().model_output(batch)


class OwnClassifier(Classifier):
    def model_output(self, batch):
        return super().model_output(batch)


class TwoClasses(Classifier):
    def get_logits(self, batch):
        return super().get_logits(batch)[:, :2]

    def get_labels(self, batch):
        return batch[1].clamp(max=1)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.get_logits(batch), self.get_labels(batch))


class SGDClassifier(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5, weight_decay=0.01)


def fitted(root, module_type=Model, seed=0, **kwargs):
    L.seed_everything(seed, verbose=False)
    saving = ModelCheckpoint(root / "files", save_top_k=-1, filename="{epoch}")
    trainer, module = make_trainer(root, TRAKCallback(root / "store", **kwargs), saving, max_epochs=2), module_type()
    trainer.fit(module, datamodule=Texts())
    return trainer, module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return root, *fitted(root)


def whitened_float64(module, curvature, dataset):
    """Slow and obvious: an example, a backward pass, a parameter at a time. Returns φ and Q."""
    module = copy.deepcopy(module).double().eval()
    rows, loss_grads = [], []
    for (words,) in dataset:
        losses = nn.functional.cross_entropy(module(words[None])[0, :-1], words[1:], reduction="mean")
        p = torch.exp(-losses)
        gradients = torch.autograd.grad(torch.log(p / (1 - p)), list(module.parameters()))
        parts = []
        for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
            values = curvature.eigenvalues[name].double()
            rotated = curvature.bases[name].rotate(DenseGradient(gradient[None].float()))[0].double()
            parts.append(rotated / (values + values.mean()).sqrt())
        rows.append(torch.cat(parts).numpy())
        loss_grads.append(1 - p.item())
    return np.array(rows), np.array(loss_grads)


def reference(store, module):
    """Scores averaged over the checkpoints of a store, with the curvature that it has."""
    total = 0.0
    for entry in store:
        module = copy.deepcopy(module)
        module.load_state_dict(load_weights(entry.weights_path, entry.digest))
        curvature = Curvature.from_tensors({name: torch.from_numpy(x) for name, x in entry.read_whitening().items()})
        train, q = whitened_float64(module, curvature, tokens(N, 0))
        targets, _ = whitened_float64(module, curvature, tokens(M, 1))
        total = total + (train @ targets.T) * q[:, None] / N / len(store)
    return total


def test_scores_are_those_of_a_slow_loop(tmp_path):
    trainer, module = fitted(tmp_path, **WHOLE)
    found = trainer.attribute(datamodule=Texts()).scores
    expected = reference(FeatureStore(tmp_path / "store"), module)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3 * np.abs(expected).max())


def test_few_entries_are_nearly_as_good(tmp_path):
    trainer, module = fitted(tmp_path, proj_dim=8 * 40)
    entry = next(iter(FeatureStore(tmp_path / "store")))
    assert entry.features["indices"].shape == (N, 40)
    found = trainer.attribute(datamodule=Texts()).scores
    expected = reference(FeatureStore(tmp_path / "store"), module)
    assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.9


def test_self_influence_is_that_of_a_slow_loop(run):
    _, trainer, module = run
    found = trainer.attribute_self(datamodule=Texts())
    expected = 0.0
    store = FeatureStore(run[0] / "store")
    for entry in store:
        module.load_state_dict(load_weights(entry.weights_path, entry.digest))
        curvature = Curvature.from_tensors({name: torch.from_numpy(x) for name, x in entry.read_whitening().items()})
        train, q = whitened_float64(module, curvature, tokens(N, 0))
        expected = expected + q**2 * (train**2).sum(1) / N / len(store)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_it_is_told(run, said):
    root, _, _ = run
    attribution = fresh(root).attribute(Model(), datamodule=Texts())
    assert attribution.info.preconditioner == "kronecker"
    assert (attribution.info.projector, attribution.info.proj_dim) == ("largest", 127)
    assert set(attribution.info.dampings) == {1.0}
    assert attribution.info.temperature == 1
    assert ", whitened, damping 1 relative to each parameter's mean eigenvalue" in said()[-1]


def test_it_is_saved(run, tmp_path):
    _, trainer, _ = run
    attribution = trainer.attribute(datamodule=Texts())
    attribution.save(tmp_path / "scores")
    assert Attribution.load(tmp_path / "scores").info == attribution.info


def test_extremes_are_those_of_all_scores(run):
    _, trainer, _ = run
    whole, few = trainer.attribute(datamodule=Texts()), trainer.attribute(datamodule=Texts(), top_k=3)
    assert torch.equal(few.top(3).indices, whole.top(3).indices)


def test_training_is_not_disturbed(tmp_path):
    """The labels are drawn from random states of their own."""
    _, with_callback = fitted(tmp_path / "with", Model)
    L.seed_everything(0, verbose=False)
    alone = Plain()
    saving = ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename="{epoch}")
    make_trainer(tmp_path, saving, max_epochs=2).fit(alone, datamodule=Texts())
    for one, other in zip(with_callback.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_same_labels_are_drawn_again(run, tmp_path):
    """Later, from the files, whatever was drawn before."""
    torch.rand(7)
    files = sorted((run[0] / "files").iterdir())
    fresh(tmp_path).attribute(Model(), datamodule=Texts(), ckpt_path=files)
    first, again = FeatureStore(run[0] / "store"), FeatureStore(tmp_path / "store")
    for digest in first.digests:
        for name, array in first[digest].features.items():
            np.testing.assert_array_equal(again[digest].features[name], array)


def test_an_interrupted_featurization_goes_on_with_the_same_curvature(run, tmp_path, monkeypatch):
    _, trainer, _ = run
    expected = trainer.attribute(datamodule=Texts()).scores
    monkeypatch.setattr("lightning_trak.trainer.featurizing.plan.rows_in_a_chunk", lambda *_: 10)
    files = sorted((run[0] / "files").iterdir())
    torch.testing.assert_close(fresh(tmp_path).attribute(Model(), Texts(), ckpt_path=files).scores, expected)
    before = {}
    for entry in FeatureStore(tmp_path / "store"):
        assert len(entry.train.all()) == -(-N // 10)
        before[entry.digest] = entry.read_whitening()
        for rows in entry.train.all()[1:]:
            entry.train.path(rows.start).unlink()
    torch.testing.assert_close(fresh(tmp_path).attribute(Model(), datamodule=Texts()).scores, expected)
    for entry in FeatureStore(tmp_path / "store"):
        for name, array in entry.read_whitening().items():
            np.testing.assert_array_equal(before[entry.digest][name], array)


@pytest.mark.parametrize("damage", ["flipped", "gone"])
@pytest.mark.parametrize("name", ["whitening.safetensors", "train/0000000000.safetensors"])
def test_damage_is_told_and_mended(run, tmp_path, name, damage):
    """Features of a curvature that is lost are computed again too: its eigenvectors are another set."""
    root, trainer, _ = run
    shutil.copytree(root / "store", tmp_path / "store")
    path = next(iter(FeatureStore(tmp_path / "store"))).path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()
    if damage == "flipped":
        path.write_bytes(content)
    told = damage == "flipped" or name == "whitening.safetensors"
    with pytest.warns(UserWarning, match="is damaged") if told else nullcontext():
        found = fresh(tmp_path).attribute(Model(), datamodule=Texts()).scores
    torch.testing.assert_close(found, trainer.attribute(datamodule=Texts()).scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [{"preconditioner": "none"}, {"proj_dim": 64}, {"curvature": False}, {"estimator": "trak"}],
)
def test_a_store_of_whitened_gradients_is_of_no_other_setting(run, other):
    root, _, _ = run
    message = "gradients that are whitened, but here they are not"
    if "proj_dim" in other:
        message = "preconditioner.entries=256.*restore the former proj_dim"
    with pytest.raises(ValueError, match=f"was made with {message}"):
        fresh(root, **other).attribute(Model(), datamodule=Texts())


def test_a_store_without_whitening_goes_on_without(tmp_path):
    trainer, _ = fitted(tmp_path, preconditioner="none", proj_dim=64)
    expected = trainer.attribute(datamodule=Texts()).scores
    found = fresh(tmp_path).attribute(Model(), datamodule=Texts())
    assert found.info.preconditioner is None
    torch.testing.assert_close(found.scores, expected)


@pytest.mark.parametrize(
    ("module_type", "settings"),
    [
        (OwnOutput, {}),
        (Model, {"projector": "sparse"}),
        (Model, {"damping": 0.1}),
        (Model, {"curvature": False}),
        (Model, {"estimator": "trak"}),
        (Model, {"preconditioner": "none"}),
    ],
)
def test_other_outputs_and_settings_are_not_whitened_by_default(tmp_path, module_type, settings):
    trainer, _ = fitted(tmp_path, module_type, proj_dim=16, **settings)
    assert trainer.attribute(datamodule=Texts()).info.preconditioner is None


@pytest.mark.parametrize("from_files", [False, True])
@pytest.mark.parametrize(("module_type", "found"), [(Classifier, "kronecker"), (TwoClasses, None)])
def test_classes_are_whitened_by_default_if_there_are_three(tmp_path, module_type, found, from_files):
    """Of two classes, no label is left to draw, and projections find more."""
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(module_type(), datamodule=Blobs())
    assert trainer.attribute(datamodule=Blobs()).info.preconditioner == found
    if from_files:
        files = [entry.weights_path for entry in FeatureStore(tmp_path / "store")]
        later = make_trainer(tmp_path, TRAKCallback(tmp_path / "other"))
        attribution = later.attribute(module_type(), datamodule=Blobs(), ckpt_path=files)
        assert attribution.info.preconditioner == found


class Line(RegressionMixin, L.LightningModule):
    """Regression of as many numbers as asked for."""

    def __init__(self, numbers):
        super().__init__()
        self.layer = nn.Linear(4, numbers)

    def forward(self, x):
        return self.layer(x)

    def get_labels(self, batch):
        return batch[0][:, : self.layer.out_features]

    def training_step(self, batch, batch_idx):
        return self.output_to_loss(self.model_output(batch), batch).mean()

    def validation_step(self, batch, batch_idx): ...

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByDescent(Model):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_damping_of_many_parts_does_not_follow_from_the_training_time(tmp_path):
    trainer, _ = fitted(tmp_path, ByDescent)
    assert set(trainer.attribute(datamodule=Texts()).info.dampings) == {1.0}
    for entry in FeatureStore(tmp_path / "store"):
        assert entry.meta["training_time"] is not None
        assert entry.whitening_notes["damping"] == entry.whitening_notes["eigenvalues"]


@pytest.mark.parametrize(("first", "found"), [("none", None), ("auto", "kronecker")])
def test_another_training_goes_on_as_the_store_does(tmp_path, first, found):
    """Also with another damping, which by itself would leave a new store without whitening."""
    for number, options in enumerate([{"preconditioner": first}, {}, {"damping": 0.1}, {"overwrite": True}]):
        L.seed_everything(number, verbose=False)
        trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", **options), max_epochs=1)
        trainer.fit(Classifier(), datamodule=Blobs())
        expected = "kronecker" if options.get("overwrite") else found
        assert trainer.attribute(datamodule=Blobs()).info.preconditioner == expected
    assert len(FeatureStore(tmp_path / "store")) == 1
    with pytest.raises(ValueError, match="gradients that are whitened, but here they are not"):
        make_trainer(tmp_path, TRAKCallback(tmp_path / "store", preconditioner="none")).fit(
            Classifier(), datamodule=Blobs()
        )


@pytest.mark.parametrize("row", [0, 30])
def test_training_examples_with_nan_are_named(tmp_path, run, row):
    class WithNaN(Blobs):
        def setup(self, stage):
            super().setup(stage)
            if stage == "fit":
                self.train_set.tensors[0][row] = float("nan")

    torch.save(Classifier().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"model_output is NaN or infinite for train rows {row}"):
        fresh(tmp_path).attribute(Classifier(), datamodule=WithNaN(), ckpt_path=tmp_path / "weights.pt")


@pytest.mark.parametrize(("asked", "found"), [("auto", None), ("kronecker", "kronecker")])
def test_several_numbers_are_whitened_if_asked_for(tmp_path, asked, found):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", preconditioner=asked), max_epochs=1)
    trainer.fit(Line(3), datamodule=Blobs())
    attribution = trainer.attribute(datamodule=Blobs())
    assert attribution.info.preconditioner == found
    assert attribution.scores.abs().sum() > 0


def test_a_single_number_tells_all(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", preconditioner="kronecker"), max_epochs=1)
    with pytest.raises(ValueError, match="output of Line tells all"):
        trainer.fit(Line(1), datamodule=Blobs())


def test_damping_is_relative_to_the_mean_eigenvalue(tmp_path):
    trainer, _ = fitted(tmp_path, preconditioner="kronecker", damping=0.3)
    info = trainer.attribute(datamodule=Texts()).info
    assert (info.preconditioner, set(info.dampings)) == ("kronecker", {0.3})


@pytest.mark.parametrize("module_type", [Model, Classifier, SGDClassifier])
def test_damping_can_be_changed_without_featurizing_again(tmp_path, module_type):
    """All entries are stored, so it makes no difference with which λ they were whitened."""
    data = Texts() if module_type is Model else Blobs()
    scores, own = {}, {}
    for first, later in (("auto", 0.3), (0.3, "auto"), ("auto", 0)):
        root = tmp_path / f"{first}"
        options = {"preconditioner": "kronecker", **WHOLE}
        if not root.exists():
            L.seed_everything(0, verbose=False)
            trak, saving = TRAKCallback(root / "store", damping=first, **options), ModelCheckpoint(save_top_k=-1)
            trainer = make_trainer(root, trak, saving, max_epochs=2)
            trainer.fit(module_type(), datamodule=data)
            scores[first, first] = trainer.attribute(datamodule=data).scores
            own[first, first] = trainer.attribute_self(datamodule=data)
        again = make_trainer(root, TRAKCallback(root / "store", damping=later, **WHOLE))
        attribution = again.attribute(module_type(), datamodule=data)
        scores[first, later], own[first, later] = (
            attribution.scores,
            again.attribute_self(module_type(), datamodule=data),
        )
        assert attribution.info.preconditioner == "kronecker"
    for damping in ("auto", 0.3):
        other = 0.3 if damping == "auto" else "auto"
        expected = scores[damping, damping]
        torch.testing.assert_close(scores[other, damping], expected, rtol=1e-2, atol=2e-3 * expected.abs().max().item())
        torch.testing.assert_close(own[other, damping], own[damping, damping], rtol=1e-2, atol=1e-3)
    assert scores["auto", 0].isfinite().all()


@pytest.mark.parametrize(
    ("module_type", "message"),
    [
        (OwnClassifier, "needs labels drawn .* OwnClassifier does not define"),
        (TwoClasses, "output of TwoClasses tells all"),
    ],
)
def test_labels_must_be_left_to_draw(tmp_path, module_type, message):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", preconditioner="kronecker"), max_epochs=1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module_type(), datamodule=Blobs())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"projector": "sparse"}, "projector must be left out, got projector='sparse'"),
        ({"curvature": False}, "curvature must be left out, got curvature=False"),
        ({"estimator": "trak"}, "estimator must be left out, got estimator='trak'"),
    ],
)
def test_what_whitening_replaces_must_be_left_out(other, message):
    with pytest.raises(ValueError, match=message):
        TRAKCallback("store", preconditioner="kronecker", **other)


def test_its_name_is_checked():
    with pytest.raises(ValueError, match="preconditioner must be one of 'auto', 'kronecker', 'none', got 'ekfac'"):
        TRAKCallback("store", preconditioner="ekfac")


def rest_float64(module, curvature, dataset, strength):
    """Slow and obvious, as `whitened_float64`: φ of the log-odds of the label, and p of the label."""
    module = copy.deepcopy(module).double().eval()
    rows, probabilities = [], []
    for x, y in dataset:
        p = module(x[None].double()).softmax(1)[0, y]
        gradients = torch.autograd.grad(torch.log(p / (1 - p)), list(module.parameters()))
        parts = []
        for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
            values = curvature.eigenvalues[name].double()
            rotated = curvature.bases[name].rotate(DenseGradient(gradient[None].float()))[0].double()
            parts.append(rotated / (values + (values.mean() if strength is None else strength)).sqrt())
        rows.append(torch.cat(parts).numpy())
        probabilities.append(p.item())
    return np.array(rows), np.array(probabilities)


@pytest.mark.parametrize(("module_type", "known"), [(SGDClassifier, True), (Classifier, False)])
def test_classes_are_whitened_by_what_the_label_leaves_open(tmp_path, module_type, known):
    """τ = φ_zᵀ (I + Φᵀ diag(w / n) Φ)⁻¹ φᵢ qᵢ / n, q and w of outputs divided by 1.3, λ from SGD's training time."""
    L.seed_everything(0, verbose=False)
    callback = TRAKCallback(tmp_path / "store", preconditioner="kronecker", proj_dim=1000)
    trainer, module, data = make_trainer(tmp_path, callback, max_epochs=2), module_type(), Blobs()
    trainer.fit(module, datamodule=data)
    attribution, own = trainer.attribute(datamodule=data), trainer.attribute_self(datamodule=data)
    data.setup("test")
    store, expected, expected_own = FeatureStore(tmp_path / "store"), 0.0, 0.0
    for entry in store:
        module.load_state_dict(load_weights(entry.weights_path, entry.digest))
        curvature = Curvature.from_tensors({name: torch.from_numpy(x) for name, x in entry.read_whitening().items()})
        strength = None
        if known:
            steps = max(one.meta["global_step"] for one in store)
            strength = 1 / (0.5 * steps * 0.05 / 0.5) + 0.01
        train, p = rest_float64(module, curvature, data.train_set, strength)
        targets, _ = rest_float64(module, curvature, data.test_set, strength)
        q = 1 / (1 + ((p / (1 - p)) ** (1 / 1.3)))
        q, w = q / 1.3, q * (1 - q) / 1.3**2
        n = len(p)
        inverse = np.linalg.inv(np.eye(train.shape[1]) + train.T @ (w[:, None] * train) / n)
        expected = expected + train @ inverse @ targets.T * q[:, None] / n / len(store)
        expected_own = expected_own + q**2 * np.einsum("ip,pq,iq->i", train, inverse, train) / n / len(store)
    np.testing.assert_allclose(attribution.scores, expected, rtol=2e-2, atol=5e-3 * np.abs(expected).max())
    np.testing.assert_allclose(own, expected_own, rtol=2e-2, atol=2e-3 * np.abs(expected_own).max())
    assert attribution.info.preconditioner == "kronecker"
    assert set(attribution.info.damping_rules) == {
        "from the training time" if known else "relative to each parameter's mean eigenvalue"
    }
    again = fresh(tmp_path).attribute(module_type(), datamodule=data)  # settings left at their defaults are the store's
    torch.testing.assert_close(again.scores, attribution.scores)


def test_second_moments_that_float32_does_not_solve(tmp_path, monkeypatch):
    """Those of low rank, for example: at a high learning rate, few hidden units stay alive."""

    def scores(name):
        L.seed_everything(1, verbose=False)
        trainer = make_trainer(tmp_path / name, TRAKCallback(tmp_path / name / "store"), max_epochs=1)
        trainer.fit(Classifier(), datamodule=Blobs())
        return trainer.attribute(datamodule=Blobs()).scores

    reference, solve = scores("float32"), torch.linalg.eigh

    def fails_in_float32(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    torch.testing.assert_close(scores("float64"), reference, rtol=0.02, atol=0.01 * reference.abs().max().item())
