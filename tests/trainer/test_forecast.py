"""What is said before the work: what it takes, and what would fail."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import FeatureStore, TRAKCallback
from tests.conftest import Blobs, Classifier, make_trainer
from tests.trainer.references import fresh
from tests.trainer.test_attribute_leaves_no_trace import assert_same, snapshot

Usage = namedtuple("Usage", "total used free")


class Wide(Classifier):
    """Has some thousand parameters."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(30, 80), nn.ReLU(), nn.Linear(80, 10))

    def train_dataloader(self):
        x = torch.randn(600, 30, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, torch.arange(600) % 10), 50)

    def test_dataloader(self):
        x = torch.randn(96, 30, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, torch.arange(96) % 10), 50)


@pytest.fixture
def files(tmp_path):
    paths = []
    for number in range(2):
        torch.manual_seed(number)
        paths.append(tmp_path / f"{number}.pt")
        torch.save(Wide().state_dict(), paths[-1])
    return paths


def bytes_below(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("options", [{}, {"preconditioner": "none"}, {"preconditioner": "none", "memory_limit": 0}])
def test_the_bytes_are_those_that_the_work_adds(tmp_path, files, options):
    own = fresh(tmp_path, **options)
    told = own.attribute(Wide(), ckpt_path=files, dry_run=True)
    assert not (tmp_path / "store").exists()
    own.attribute(Wide(), ckpt_path=files)
    actual = bytes_below(tmp_path / "store")
    assert 0.85 * actual < told.disk < 1.05 * actual  # files have headers, too
    names = [stage.name for stage in told.stages]
    assert names == ["weights", *["curvature"] * (not options), "train set", "targets"] + (
        ["H and its solutions", "scores"] if options else ["scores"]
    )
    assert all(stage.seconds > 0 for stage in told.stages if stage.name != "weights")
    assert told.problem == ""
    assert str(told).splitlines()[0].split() == ["stage", "time", "disk", "memory"]


def test_only_what_is_missing_counts(tmp_path, files):
    own = fresh(tmp_path, preconditioner="none")
    whole = {stage.name: stage for stage in own.attribute(Wide(), ckpt_path=files, dry_run=True).stages}
    own.attribute(Wide(), ckpt_path=files[:1])
    before = bytes_below(tmp_path / "store")
    half = {stage.name: stage for stage in own.attribute(Wide(), ckpt_path=files, dry_run=True).stages}
    for name in ("weights", "train set", "targets"):
        assert half[name].disk * 2 == whole[name].disk
    assert {stage.name for stage in own.attribute(Wide(), dry_run=True).stages} == {
        "targets",  # in memory
        "H and its solutions",
        "scores",
    }
    assert bytes_below(tmp_path / "store") == before
    assert len(FeatureStore(tmp_path / "store")) == 1


def test_model_and_trainer_are_left_as_they_were(run):
    _, trainer, module, _ = run
    before = snapshot(trainer, module)
    trainer.attribute(dry_run=True)
    assert_same(before, snapshot(trainer, module))


def test_a_disk_without_room_is_told_and_refused(tmp_path, files, monkeypatch):
    own, rows = fresh(tmp_path, preconditioner="none"), []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**5, 10**5))
    told = own.attribute(Wide(), ckpt_path=files, dry_run=True)
    assert "MB are needed on the disk of the store, and 100 kB are free" in told.problem
    assert "It would fail" in str(told)

    class Counting(Wide):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    with pytest.raises(OSError, match=r"GB are needed, 0.0001 GB are free.*Free space there"):
        own.attribute(Counting(), ckpt_path=files)
    assert sum(rows) < 100  # of 1200


def test_training_does_not_begin_if_the_disk_has_no_room_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 100, 100))
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"))
    with pytest.raises(OSError, match="Free space there"):
        trainer.fit(Classifier(), datamodule=Blobs())
    assert trainer.global_step == 0


def test_what_a_checkpoint_takes_is_told_when_training_begins(tmp_path, said):
    make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1).fit(Classifier(), datamodule=Blobs())
    (line,) = [line for line in said() if "at each checkpoint" in line]
    assert "featurizing 40 examples takes about" in line
    assert "kB on the disk, which has room for" in line
