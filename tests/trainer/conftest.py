"""One trained run, shared by the tests that only read it."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_trak import TRAKCallback
from tests.conftest import Blobs, Classifier, make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One trained run of three checkpoints, shared by the tests that only read it."""
    root = tmp_path_factory.mktemp("run")
    L.seed_everything(0, verbose=False)
    saving = ModelCheckpoint(root / "files", save_top_k=-1, monitor="val_loss", filename="{epoch}")
    trainer = make_trainer(root, TRAKCallback(root / "store"), saving)
    module, data = Classifier(), Blobs()
    trainer.fit(module, datamodule=data)
    return root, trainer, module, data
