"""Calibrated scores, against retrainings that are made up from scores which the method does not know."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_trak import Attribution, TRAKCallback, calibrate, evaluate
from lightning_trak.evaluation.ground_truth import GroundTruth
from lightning_trak.metrics import predicted_outputs
from tests.conftest import Blobs, Classifier, make_trainer
from tests.trainer.featurizing.test_whitening import Model, Texts

SUBSETS = 40


def made_up(scores, noise=0.0):
    """The outputs of models whose training examples have these effects."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(SUBSETS, len(scores), generator=generator).argsort(1) < len(scores) // 2
    outputs = predicted_outputs(scores, masks) / masks.float().mean(1, keepdim=True)
    return GroundTruth(
        masks, (outputs + noise * outputs.std() * torch.randn(outputs.shape, generator=generator))[:, None]
    )


def parts(truth, count):
    return [GroundTruth(truth.masks[own], truth.repeats[own]) for own in (slice(0, count), slice(count, None))]


@pytest.fixture(scope="module", params=[(Classifier, Blobs, 16), (Model, Texts, 2048)], ids=["classes", "texts"])
def run(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    module, data, proj_dim = request.param
    L.seed_everything(0, verbose=False)
    saving = ModelCheckpoint(root / "files", save_top_k=-1, filename="{epoch}")
    trainer = make_trainer(root, TRAKCallback(root / "store", proj_dim=proj_dim), saving, max_epochs=3)
    trainer.fit(module(), datamodule=data())
    return trainer, data(), sorted((root / "files").glob("*.ckpt"))


def test_size_and_weights_of_checkpoints_are_found(run):
    """Retraining follows the scores of one checkpoint alone, three times as large."""
    trainer, data, files = run
    alone = trainer.attribute(datamodule=data, ckpt_path=files[1])
    some, unseen = parts(made_up(3 * alone.scores), 15)
    attribution = trainer.attribute(datamodule=data)
    calibrated = calibrate(attribution, some)
    before, after = evaluate(attribution, unseen), evaluate(calibrated, unseen)
    assert after.lds > 0.97
    assert abs(after.slope - 1) < 0.1 < abs(before.slope - 1)
    assert (calibrated.info.calibrated_on, attribution.info.calibrated_on) == (15, 0)
    torch.testing.assert_close(calibrated.outputs, attribution.outputs)


def test_noise_does_little_harm(run):
    """Weights are shrunk towards the usual ones. Here are few targets: with hundreds the harm is less."""
    trainer, data, _ = run
    attribution = trainer.attribute(datamodule=data)
    some, unseen = parts(made_up(attribution.scores, noise=0.5), 15)
    assert evaluate(calibrate(attribution, some), unseen).lds > 0.8 * evaluate(attribution, unseen).lds


def test_scores_without_their_features_are_scaled(run, tmp_path):
    trainer, data, _ = run
    attribution = trainer.attribute(datamodule=data)
    attribution.save(tmp_path / "saved")
    calibrated = calibrate(Attribution.load(tmp_path / "saved"), made_up(0.2 * attribution.scores))
    torch.testing.assert_close(calibrated.scores, 0.2 * attribution.scores)
    calibrated.save(tmp_path / "again")
    assert Attribution.load(tmp_path / "again").info == calibrated.info


def test_other_data_and_top_k(run):
    trainer, data, _ = run
    attribution = trainer.attribute(datamodule=data)
    with pytest.raises(ValueError, match=r"train set and targets"):
        calibrate(attribution, made_up(attribution.scores[1:]))
    with pytest.raises(AttributeError, match="without top_k"):
        calibrate(trainer.attribute(datamodule=data, top_k=2), made_up(attribution.scores))
