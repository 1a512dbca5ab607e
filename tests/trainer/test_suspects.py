"""trainer.suspects: its numbers are those of slow ones, and planted faults are found."""

from __future__ import annotations

import json
import pickle

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_trak as lt
from lightning_trak import TRAKCallback
from lightning_trak.store.store import FeatureStore
from tests.conftest import Blobs, Classifier, make_trainer
from tests.trainer.references import fresh
from tests.trainer.test_ranks import run as run_in_processes


def weights_of(root):
    paths = sorted((root / "files").iterdir(), key=lambda path: int(path.stem.removeprefix("epoch=")))
    return [torch.load(path, weights_only=True)["state_dict"] for path in paths]


def losses_one_by_one(module, root, data, loss):
    found = []
    for weights in weights_of(root):
        module.load_state_dict(weights)
        module.eval()
        with torch.no_grad():
            found.append([loss(module(x[None]), y[None]).item() for x, y in data])
    return torch.tensor(found)


def test_numbers_are_those_of_slow_ones(run):
    root, trainer, module, data = run
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    suspects, attribution = trainer.suspects(targets=True), trainer.attribute()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    losses = losses_one_by_one(Classifier(), root, data.train_set, F.cross_entropy)
    found = suspects.findings
    torch.testing.assert_close(found.loss, (losses.mean(0) + losses[-1]) / 2, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.self_influence, trainer.attribute_self(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.harm, -attribution.scores.mean(1), rtol=1e-3, atol=1e-6)
    labels = data.train_set.tensors[1].tolist()
    assert [one.label for one in suspects] == [labels[row] for row in suspects.indices]
    model = Classifier()
    model.load_state_dict(weights_of(root)[-1])
    predictions = model.eval()(data.train_set.tensors[0]).argmax(1).tolist()
    assert [one.prediction for one in suspects] == [predictions[row] for row in suspects.indices]
    assert sorted(suspects.indices.tolist()) == list(range(40))


def test_similarity_is_the_mean_cosine_of_whitened_features(run):
    """Of sparse features, which are whitened; up to the error of sketches."""
    root, trainer, *_ = run
    found, cosines = trainer.suspects().findings, []
    for entry in FeatureStore(root / "store"):
        arrays = entry.train.columns(["indices", "values", "scale"])
        columns, values = torch.from_numpy(arrays["indices"]).long(), torch.from_numpy(arrays["values"]).float()
        dense = F.normalize(torch.zeros(40, 99).scatter_(1, columns, values))
        cosines.append(dense @ dense.T)
    mean = torch.stack(cosines).mean(0)
    expected = torch.stack([mean[row, :row].max() for row in range(1, 40)])
    assert (found.similarity[1:] - expected).abs().max() < 0.15
    assert (found.similarity[1:] - expected).abs().mean() < 0.05


class Line(lt.RegressionMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]).squeeze(1), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


N, COPY, ORIGINAL, LEAK, WRONG = 120, 90, 20, 50, (7, 33)


class Numbers(L.LightningDataModule):
    """Two wrong labels, too high and too low; a copy; and a target that is in the train set."""

    def __init__(self, faults=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = 2 * torch.rand(N + 9, 12, generator=generator) - 1
        y = x[:, :3].sum(1) + 0.3 * torch.randn(N + 9, generator=generator)
        if faults:
            x[COPY], y[COPY] = x[ORIGINAL], y[ORIGINAL]
            x[N + 4], y[N + 4] = x[LEAK], y[LEAK]
            y[WRONG[0]] += 9
            y[WRONG[1]] -= 9
        self.train_set, self.test_set = TensorDataset(x[:N], y[:N]), TensorDataset(x[N:], y[N:])

    def train_dataloader(self):
        return DataLoader(self.train_set, 20, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test_set, 4)


def fitted(root, kind, data, epochs=20, **kwargs):
    L.seed_everything(0, verbose=False)
    saving = L.pytorch.callbacks.ModelCheckpoint(root / "files", save_top_k=-1, filename="{epoch}")
    trainer = make_trainer(root, TRAKCallback(root / "store", **kwargs), saving, max_epochs=epochs)
    trainer.fit(kind(), datamodule=data)
    return trainer


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbers")
    data = Numbers()
    return root, fitted(root, Line, data), data


def test_planted_faults_are_found_and_nothing_else(numbers):
    _, trainer, _ = numbers
    suspects = trainer.suspects(targets=True)
    assert sorted(suspects.mislabelled.indices.tolist()) == [*WRONG]
    assert suspects.indices[:2].sort()[0].tolist() == [*WRONG]
    ((duplicate,), (leak,)) = suspects.duplicates, suspects.leaks
    assert (duplicate.row, duplicate.duplicate_of) == (COPY, ORIGINAL)
    assert (leak.row, leak.leaks) == (LEAK, 4)


def test_nothing_is_wrong_where_nothing_was_planted(tmp_path):
    suspects = fitted(tmp_path, Line, Numbers(faults=False)).suspects(targets=True)
    assert len(suspects.mislabelled) + len(suspects.duplicates) + len(suspects.leaks) == 0
    assert len(suspects) == N


def test_harm_is_of_the_loss_and_not_of_the_output(numbers):
    """A prediction that rises is better where it is too low, and worse where it is too high."""
    root, trainer, data = numbers
    suspects, attribution = trainer.suspects(targets=True), trainer.attribute()
    model = Line()
    model.load_state_dict(weights_of(root)[-1])
    x, y = data.test_set.tensors
    signs = (y - model(x).squeeze(1)).sign().detach()
    assert set(signs.tolist()) == {-1, 1}
    torch.testing.assert_close(suspects.findings.harm, -(attribution.scores * signs).mean(1), rtol=1e-3, atol=1e-6)


def test_dense_similarity_is_the_mean_cosine_after_whitening(numbers):
    """With H by an explicit sum and inverse, in float64, at every checkpoint."""
    root, trainer, _ = numbers
    found, info = trainer.suspects(), trainer.attribute().info
    cosines, influences = [], []
    for damping, digest in zip(info.dampings, info.checkpoints, strict=True):
        entry = FeatureStore(root / "store")[digest]
        arrays = entry.train.columns(["features", "loss_grad", "curvature"])
        phi, q, w = (torch.from_numpy(arrays[name]).double() for name in ("features", "loss_grad", "curvature"))
        matrix = (phi * w[:, None]).T @ phi
        matrix += damping * matrix.diagonal().mean() * torch.eye(len(matrix))
        products = phi @ matrix.inverse() @ phi.T
        roots = products.diagonal().sqrt()
        cosines.append(products / roots[:, None] / roots)
        influences.append(q.square() * products.diagonal())
    mean = torch.stack(cosines).mean(0)
    assert found.findings.similarity[COPY] == pytest.approx(1, abs=1e-4)
    expected = torch.stack([mean[row, :row].max() for row in range(1, N)]).float()
    assert (found.findings.similarity[1:] - expected).abs().max() < 0.15
    torch.testing.assert_close(
        found.findings.self_influence, torch.stack(influences).mean(0).float(), rtol=1e-2, atol=1e-6
    )


def test_targets_may_be_any_loader(numbers):
    _, trainer, data = numbers
    x, y = data.train_set.tensors
    suspects = trainer.suspects(targets=DataLoader(TensorDataset(x[[70, 3]], y[[70, 3]]), 2))
    assert {(one.row, one.leaks) for one in suspects.leaks} == {(70, 0), (3, 1)}
    assert trainer.suspects()[0].harm is None


def test_equal_examples_are_equal_though_more_is_stored_of_a_target(tmp_path):
    """Of whitened gradients a training example has fewer entries than a target: its largest, before any rescaling.

    They are rescaled because the damping follows from the training time, which was shorter at the first checkpoint.
    """
    data = Blobs()
    trainer = fitted(tmp_path, WithSGD, data, epochs=6, proj_dim=40)
    digests = trainer.attribute().info.checkpoints
    assert len({str(FeatureStore(tmp_path / "store")[one].whitening_notes["damping"]) for one in digests}) > 1
    found = trainer.suspects(targets=DataLoader(data.train_set, 8)).findings
    torch.testing.assert_close(found.leak_similarity, torch.ones(40), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [None, "test", [1, 2]])
def test_other_targets_are_refused(numbers, targets):
    _, trainer, _ = numbers
    with pytest.raises(TypeError, match=r"targets must be a DataLoader, or True for the targets of attribute\(\), got"):
        trainer.suspects(targets=targets)


class OwnLoss(Line):
    """Its loss is no function of the output."""

    def per_sample_loss(self, batch):
        predictions = self(batch[0]).squeeze(1)
        return (predictions - batch[1]).square() + 0.1 * self.net[0](batch[0]).square().mean(1)

    def training_step(self, batch, batch_idx):
        return self.per_sample_loss(batch).mean()


class WithSGD(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class OnlyQ(Classifier):
    """Defines Q and w, and no loss of the mixin."""

    output_to_loss = lt.TRAKMixin.output_to_loss

    def out_to_loss_grad(self, batch):
        return (-self.model_output(batch)).sigmoid() * 3

    def out_to_loss_curvature(self, batch):
        p = self.model_output(batch).sigmoid()
        return 3 * p * (1 - p)


def test_a_loss_that_needs_the_model(tmp_path):
    data = Numbers()
    suspects = fitted(tmp_path, OwnLoss, data, epochs=2).suspects(targets=True)
    expected = []
    for weights in weights_of(tmp_path):
        model = OwnLoss()
        model.load_state_dict(weights)
        expected.append(model.per_sample_loss(data.train_set.tensors).detach())
    expected = torch.stack(expected)
    torch.testing.assert_close(suspects.findings.loss, (expected.mean(0) + expected[-1]) / 2, rtol=1e-4, atol=1e-5)


def test_without_a_loss_the_square_of_q_stands_in(tmp_path):
    suspects = fitted(tmp_path, OnlyQ, Blobs(), epochs=2).suspects()
    squares = torch.stack(
        [torch.tensor(entry.loss_grad).square() for entry in FeatureStore(tmp_path / "store").entries()]
    )
    torch.testing.assert_close(suspects.findings.loss, (squares.mean(0) + squares[-1]) / 2)


def test_the_last_checkpoint_of_each_run_counts(tmp_path):
    data = Numbers()
    for seed in (0, 1):
        L.seed_everything(seed, verbose=False)
        saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename=f"{seed}-{{epoch}}")
        trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), saving, max_epochs=2)
        trainer.fit(Line(), datamodule=data)
    x, y = data.train_set.tensors
    losses = {}
    for path in (tmp_path / "files").iterdir():
        model = Line()
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        losses[path.stem] = (model(x).squeeze(1) - y).square().detach()
    mean = torch.stack(list(losses.values())).mean(0)
    last = (losses["0-epoch=1"] + losses["1-epoch=1"]) / 2
    torch.testing.assert_close(trainer.suspects().findings.loss, (mean + last) / 2, rtol=1e-4, atol=1e-5)


def test_a_trainer_that_knows_nothing_but_the_store_finds_the_same(numbers):
    root, trainer, data = numbers
    expected = trainer.suspects(targets=True).to_rows()
    assert fresh(root).suspects(Line(), datamodule=data, targets=True).to_rows() == expected
    assert lt.suspects(trainer, data, targets=True).to_rows() == expected
    assert pickle.loads(pickle.dumps(trainer.suspects(targets=True))).to_rows() == expected
    one = fresh(root).suspects(Line(), datamodule=data, ckpt_path="last")
    assert len(one) == N


def test_all_processes_end_with_the_same(tmp_path):
    run_in_processes(tmp_path / "run", "ddp", 2)
    one, other = (json.loads((tmp_path / "run" / f"suspects-{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert len(one) == 23
    assert {"loss", "self_influence", "prediction", "harm"} <= set(one[0])
