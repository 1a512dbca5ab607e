"""attribution.without(...): a model trained by Lightning, against the solution of the rest in float64."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Attribution, RegressionMixin, TRAKCallback
from tests.conftest import Blobs, Classifier, make_trainer

N, M = 30, 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N + M, 3, generator=GENERATOR)
X[1:8] = X[0] + 0.02 * X[1:8]  # duplicates
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + torch.randn(N + M, generator=GENERATOR)
DUPLICATES = list(range(8))


class Line(RegressionMixin, L.LightningModule):
    """Linear regression, trained to its optimum."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1, bias=False)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self(batch[0])[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=50, line_search_fn="strong_wolfe")


class Points(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(X[:N], Y[:N]), N)

    def test_dataloader(self):
        return DataLoader(TensorDataset(X[N:], Y[N:]), 2)


@pytest.fixture(scope="module")
def attribution(tmp_path_factory):
    root = tmp_path_factory.mktemp("line")
    L.seed_everything(0, verbose=False)
    trak = TRAKCallback(root / "store", projector="identity", damping=0, featurize_on="fit_end")
    trainer = make_trainer(root, trak, max_epochs=20)
    trainer.fit(Line(), datamodule=Points())
    return trainer.attribute(datamodule=Points(), name="saved")


def without(rows):
    """What least squares predicts for the targets without some rows."""
    x, y = (np.delete(values[:N].numpy().astype("f8"), rows, 0) for values in (X, Y))
    return X[N:].numpy() @ np.linalg.lstsq(x, y, rcond=None)[0]


def test_it_predicts_what_training_again_gives(attribution):
    np.testing.assert_allclose(attribution.outputs, without([]), atol=1e-4)
    for rows in ([4], DUPLICATES, [2, 20, 29]):
        np.testing.assert_allclose(attribution.without(rows), without(rows), atol=1e-3)
    summed = (attribution.outputs - attribution.scores[DUPLICATES].sum(0)).numpy()
    assert np.abs(summed - without(DUPLICATES)).max() > 0.1  # the set is not the sum of its members


def test_forms_of_sets(attribution):
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[0, DUPLICATES] = mask[1, 9] = True
    found = attribution.without(mask)
    assert found.shape == (3, M)
    torch.testing.assert_close(found[2], attribution.outputs)
    assert attribution.without(mask[:0]).shape == (0, M)
    torch.testing.assert_close(attribution.without(DUPLICATES), found[0])
    torch.testing.assert_close(attribution.without(np.array(DUPLICATES)), found[0])
    torch.testing.assert_close(attribution.without(mask[1]), found[1])
    torch.testing.assert_close(attribution.without([]), attribution.outputs)
    torch.testing.assert_close(attribution.without([9, 9]), found[1])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([N], rf"rows of the train set, 0 to {N - 1}; got \[{N}\]"),
        ([-1], "0 to"),
        ([0.5], "integers"),
        ([[1, 2]], "integers"),
        (torch.tensor(3), "integers"),
        (torch.ones(N + 1, dtype=torch.bool), rf"shape \({N},\)"),
        (range(N), "nothing is left"),
    ],
)
def test_sets_that_do_not_fit(attribution, indices, message):
    with pytest.raises(ValueError, match=message):
        attribution.without(indices)


def test_outputs_are_saved_and_the_way_to_features_is_not(attribution, tmp_path):
    attribution.save(tmp_path / "saved")
    for other in (Attribution.load(tmp_path / "saved"), pickle.loads(pickle.dumps(attribution))):
        torch.testing.assert_close(other.outputs, attribution.outputs)
        with pytest.raises(AttributeError, match=r"Call without\(...\) on what trainer.attribute"):
            other.without([0])
    assert copy.copy(attribution).scores is attribution.scores


def test_outputs_that_are_not_known(attribution):
    with pytest.raises(AttributeError, match="outputs of the targets are not known"):
        _ = Attribution(attribution.scores, attribution.info).outputs


def test_extremes_predict_sets_too(attribution):
    few = attribution._kept.job.trainer.attribute(datamodule=Points(), top_k=2)
    torch.testing.assert_close(few.without(DUPLICATES), attribution.without(DUPLICATES))
    assert few.parts(3, 1).score == pytest.approx(attribution.scores[3, 1].item(), rel=1e-3)


def test_outputs_are_those_of_the_last_checkpoint_of_each_run(tmp_path):
    """Changes are averaged over all checkpoints, as scores are."""
    finals, changes = [], []
    for seed in range(2):
        L.seed_everything(seed, verbose=False)
        saving = ModelCheckpoint(tmp_path / f"run{seed}", save_top_k=-1, filename="{epoch}")
        trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", damping=0.5), saving, max_epochs=2)
        module = Classifier()
        trainer.fit(module, datamodule=Blobs())
        alone = make_trainer(tmp_path, TRAKCallback(tmp_path / f"alone{seed}", damping=0.5))
        files = sorted((tmp_path / f"run{seed}").glob("*.ckpt"))
        finals.append(alone.attribute(Classifier(), datamodule=Blobs(), ckpt_path=files[-1]).outputs)
        for file in files:
            one = alone.attribute(Classifier(), datamodule=Blobs(), ckpt_path=file)
            changes.append(one.without([0, 1]) - one.outputs)
    pooled = trainer.attribute(datamodule=Blobs())
    torch.testing.assert_close(pooled.outputs, torch.stack(finals).mean(0))
    torch.testing.assert_close(
        pooled.without([0, 1]) - pooled.outputs, torch.stack(changes).mean(0), rtol=1e-3, atol=1e-5
    )


def test_the_estimator_of_the_paper(tmp_path):
    """H = Φᵀ Φ over the rest, and Q."""
    L.seed_everything(0, verbose=False)
    settings = {"estimator": "trak", "damping": 0.1, "projector": "identity"}
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", **settings), max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    attribution = trainer.attribute(datamodule=Blobs())
    kept = attribution._kept
    phi, targets = (np.asarray(array, "f8") for array in (kept.job.entries[0].features, kept.targets.features[0]))
    q, rows = kept.job.entries[0].loss_grad, [3, 4, 5]
    rest = np.delete(phi, rows, 0)
    whole = phi.T @ phi
    h = rest.T @ rest + 0.1 * np.trace(whole) / len(whole) * np.eye(len(whole))
    expected = -targets @ np.linalg.solve(h, phi[rows].T @ np.asarray(q, "f8")[rows])
    found = attribution.without(rows) - attribution.outputs
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
