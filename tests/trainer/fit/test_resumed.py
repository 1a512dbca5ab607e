"""Runs that are killed and resumed: the store has the checkpoints whose files are there, all of them and no others."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_trak import FeatureStore, TRAKCallback
from lightning_trak.store.weights import read_weights, weights_digest
from tests.conftest import Blobs, Classifier, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:The dirpath has changed")


class Killed(L.Callback):
    """Ends training at the start of the third epoch, as if it was killed: nothing is featurized."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("killed")


def kill_and_resume(root, make_trainer, resumes_from="*.ckpt"):
    """Train, be killed, and train on from the newest file; return the store, and the digests of files that are there.

    Args:
        root: where all files are.
        make_trainer: takes a callback.
        resumes_from: a pattern of the files.
    """
    L.seed_everything(0, verbose=False)
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(Killed()).fit(Classifier(), datamodule=Blobs())
    last = max(root.rglob(resumes_from), key=lambda path: path.stat().st_mtime_ns)
    make_trainer(L.Callback()).fit(Classifier(), datamodule=Blobs(), ckpt_path=str(last))
    files = [path for path in root.rglob("*.ckpt") if path.name != "strange.ckpt"]
    return FeatureStore(root / "store"), {weights_digest(read_weights(path)) for path in files}


def assert_has(store, kept):
    assert set(store.digests) == kept
    assert all(entry.complete for entry in store)


@pytest.mark.parametrize("featurize_on", ["save", "fit_end"])
def test_files_in_the_folder_of_an_earlier_logger(tmp_path, featurize_on):
    def trainer(killer):
        trak, saving = TRAKCallback(tmp_path / "store", featurize_on=featurize_on), ModelCheckpoint(save_top_k=-1)
        return make_trainer(tmp_path, trak, saving, killer, logger=CSVLogger(tmp_path))

    store, kept = kill_and_resume(tmp_path, trainer)
    assert len({path.parent for path in tmp_path.rglob("*.ckpt")}) == 2
    assert len(kept) == 3
    assert_has(store, kept)


def test_files_of_weights_alone(tmp_path):
    """The first epoch's is one: the full file was deleted when the second was saved."""

    def trainer(killer):
        savers = [
            ModelCheckpoint(tmp_path / "weights", save_top_k=-1, save_weights_only=True),
            ModelCheckpoint(tmp_path / "full", every_n_train_steps=5),  # an epoch has five
        ]
        return make_trainer(tmp_path, TRAKCallback(tmp_path / "store", featurize_on="fit_end"), *savers, killer)

    store, kept = kill_and_resume(tmp_path, trainer, "full/*.ckpt")
    assert len(kept) == 3
    assert_has(store, kept)


@pytest.mark.parametrize("link", [False, True])
def test_files_that_are_deleted_after_the_resumption(tmp_path, link):
    """Also through a symbolic link."""
    folder = tmp_path / "files"
    if link:
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")

    def trainer(killer):
        saving = ModelCheckpoint(folder, save_top_k=1, save_last=True)
        return make_trainer(tmp_path, TRAKCallback(tmp_path / "store", featurize_on="fit_end"), saving, killer)

    store, kept = kill_and_resume(tmp_path, trainer, "last.ckpt")
    assert len(kept) == 1
    assert_has(store, kept)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02}q\x00.", b"PK\x03\x04"])
def test_files_that_are_no_checkpoints_do_not_end_training(tmp_path, content):
    def trainer(killer):
        saving = ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename="{epoch}")
        return make_trainer(tmp_path, TRAKCallback(tmp_path / "store", featurize_on="fit_end"), saving, killer)

    (tmp_path / "files").mkdir()
    strange = tmp_path / "files" / "strange.ckpt"
    strange.write_bytes(content)
    with pytest.warns(UserWarning, match=r"Whether a checkpoint file is of this run cannot be told.*strange\.ckpt"):
        store, kept = kill_and_resume(tmp_path, trainer, "epoch=1.ckpt")
    assert len(kept) == 3
    assert_has(store, kept)
