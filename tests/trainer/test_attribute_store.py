"""What attribute takes from the store, and from checkpoint files."""

from __future__ import annotations

import shutil
import subprocess
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_trak import Attribution, FeatureStore, TRAKCallback
from lightning_trak.influence import TrainFeatures
from lightning_trak.projection import FactoredProjector
from tests.conftest import Blobs, Classifier, make_trainer
from tests.trainer.references import fresh


def test_a_fresh_process_needs_the_store_alone(run):
    root, trainer, _, _ = run
    script = f"""
import warnings; warnings.filterwarnings("ignore")
import sys; sys.path.insert(0, {str(__file__.rsplit("/tests/", 1)[0])!r})
import torch, lightning as L
from lightning_trak import TRAKCallback
from tests.conftest import Blobs, Classifier
trainer = L.Trainer(callbacks=[TRAKCallback({str(root / "store")!r})], logger=False, accelerator="cpu")
torch.save(trainer.attribute(Classifier(), datamodule=Blobs()).scores, {str(root / "scores.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(root / "scores.pt"), trainer.attribute().scores)


def test_store_settings_hold_where_the_callback_says_nothing(tmp_path):
    L.seed_everything(0, verbose=False)
    settings = {"proj_dim": 16, "projector": "rademacher", "seed": 7, "parameters": "net.*.weight"}
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", **settings), max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    expected = trainer.attribute().scores
    torch.testing.assert_close(fresh(tmp_path).attribute(Classifier(), datamodule=Blobs()).scores, expected)
    for other in ({"seed": 8}, {"proj_dim": 17}, {"projector": "sparse"}, {"parameters": "net.0.weight"}):
        with pytest.raises(ValueError, match=r"was made with .*, but here"):
            fresh(tmp_path, **other).attribute(Classifier(), datamodule=Blobs())


@pytest.mark.parametrize("preconditioner", ["none", "kronecker"])
def test_features_are_read_twice_at_most_and_sums_over_them_are_kept(tmp_path, run, monkeypatch, preconditioner):
    """Once to sum H, once to score; a second call does neither."""
    root, _, _, data = run
    read, block = [], TrainFeatures.block
    files = sorted((root / "files").iterdir())

    def noting(self, *args, **kwargs):
        read.append(self.shape)
        return block(self, *args, **kwargs)

    monkeypatch.setattr(TrainFeatures, "block", noting)
    own = fresh(tmp_path, preconditioner=preconditioner)
    first = own.attribute(Classifier(), datamodule=data, ckpt_path=files)
    checkpoints = len(first.info.checkpoints)
    assert len(read) == 2 * checkpoints
    read.clear()
    second = own.attribute(Classifier(), datamodule=data, ckpt_path=files)
    assert not read
    assert torch.equal(first.scores, second.scores)
    assert first.info == second.info


def test_the_whole_projection_is_its_identity(tmp_path):
    """Another rank, or a rank that was forgotten, gave scores of two projections mixed."""
    L.seed_everything(0, verbose=False)
    trak = TRAKCallback(tmp_path / "store", projector=FactoredProjector(16, rank=2))
    trainer = make_trainer(tmp_path, trak, max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    expected = trainer.attribute().scores
    torch.testing.assert_close(fresh(tmp_path).attribute(Classifier(), datamodule=Blobs()).scores, expected)
    for other in ("factored", FactoredProjector(16, rank=3)):
        with pytest.raises(ValueError, match=r"made with projection.arguments.rank=2, but here"):
            fresh(tmp_path, projector=other).attribute(Classifier(), datamodule=Blobs())
    drawn_anew = FactoredProjector(16, rank=2)
    drawn_anew.drawing = 2
    with pytest.raises(ValueError, match=r"made with projection.drawing=1, but here projection.drawing=2"):
        fresh(tmp_path, projector=drawn_anew).attribute(Classifier(), datamodule=Blobs())


class Passing(TRAKCallback):
    """A callback of the user's own, that passes on what it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


def test_store_settings_hold_for_a_subclass_too(tmp_path):
    trainer = make_trainer(
        tmp_path, Passing(tmp_path / "store", proj_dim=20, seed=5, preconditioner="none"), max_epochs=1
    )
    trainer.fit(Classifier(), datamodule=Blobs())
    expected = trainer.attribute()
    found = make_trainer(tmp_path, Passing(tmp_path / "store")).attribute(Classifier(), datamodule=Blobs())
    assert found.info.proj_dim == 20
    assert torch.equal(found.scores, expected.scores)


def test_checkpoints_brought_along(tmp_path, run):
    root, trainer, _, data = run
    files = sorted((root / "files").iterdir())
    plain = tmp_path / "plain.pt"
    torch.save(torch.load(files[0], weights_only=True)["state_dict"], plain)
    scores = fresh(tmp_path).attribute(Classifier(), datamodule=data, ckpt_path=[plain, *files[1:]]).scores
    torch.testing.assert_close(scores, trainer.attribute(ckpt_path=files).scores, rtol=1e-3, atol=1e-5)
    one = fresh(tmp_path).attribute(Classifier(), datamodule=data, ckpt_path=str(files[1]))
    assert len(one.info.checkpoints) == 1
    assert len(FeatureStore(tmp_path / "store")) == 3


def test_best_and_last(run):
    root, trainer, _, _ = run
    best = trainer.attribute(ckpt_path="best")
    expected = trainer.attribute(ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert best.info.checkpoints == expected.info.checkpoints
    store = FeatureStore(root / "store")
    assert trainer.attribute(ckpt_path="last").info.checkpoints == (store.digests[-1],)
    with pytest.raises(MisconfigurationException, match="no ModelCheckpoint that saved a best"):
        fresh(root).attribute(Classifier(), datamodule=Blobs(), ckpt_path="best")


def test_top_k_is_the_extremes_of_the_whole(run):
    _, trainer, _, _ = run
    whole, extremes = trainer.attribute(), trainer.attribute(top_k=4)
    for side in ("top", "bottom"):
        expected, got = getattr(whole, side)(3), getattr(extremes, side)(3)
        assert torch.equal(expected.values, got.values)
        assert torch.equal(whole.scores.T.gather(1, got.indices), got.values)  # two examples may tie
    with pytest.raises(AttributeError, match="without top_k"):
        extremes.scores  # noqa: B018
    assert trainer.attribute(top_k=1000).top(40).indices.shape == (7, 40)


def test_name_keeps_the_result_in_the_store(run):
    root, trainer, _, _ = run
    attribution = trainer.attribute(name="first")
    loaded = Attribution.load(root / "store" / "scores" / "first")
    assert torch.equal(loaded.scores, attribution.scores)
    assert repr(loaded) == repr(attribution)


@pytest.mark.parametrize("name", ["a/b", "", "..", "a\0b", 3])
def test_a_name_that_cannot_be_used_is_refused_before_the_work(run, name, said):
    root, *_ = run
    with pytest.raises(ValueError, match="name must be usable as a folder name"):
        fresh(root).attribute(Classifier(), datamodule=Blobs(), name=name)
    assert "averaging" not in " ".join(said())


def test_scores_that_cannot_be_saved_are_returned(run, tmp_path):
    root, *_ = run
    shutil.copytree(root / "store", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "scores", ignore_errors=True)
    (tmp_path / "store" / "scores").write_text("a file in the way")
    with pytest.warns(UserWarning, match="The scores are returned, but could not be saved as 'mine'"):
        attribution = fresh(tmp_path).attribute(Classifier(), datamodule=Blobs(), name="mine")
    assert attribution.scores.shape == (40, 7)
