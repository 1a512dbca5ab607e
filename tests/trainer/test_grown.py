"""Examples that are added to the train set are all that is featurized."""

from __future__ import annotations

import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import FeatureStore, TRAKCallback
from lightning_trak.data.identity import fingerprint
from tests.conftest import Classifier, make_data, make_trainer
from tests.trainer.references import fresh

N, CHECKED = 40, 8
ALL = make_data(150)
TARGETS = DataLoader(make_data(5, 2), 5)


class Counting(Classifier):
    """Counts the examples of its forward passes."""

    rows = 0

    def forward(self, x):
        Counting.rows += len(x)
        return super().forward(x)


class First(L.LightningDataModule):
    """The first n of the examples; with ``changed``, one of them differs."""

    def __init__(self, n, changed=None):
        super().__init__()
        x, y = (part[:n].clone() for part in ALL.tensors)
        if changed is not None:
            x[changed] += 1
        self.train_set = TensorDataset(x, y)

    def train_dataloader(self):
        return DataLoader(self.train_set, 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(make_data(12, 1), 6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The files of two checkpoints, and the manifest of a store of N examples."""
    root = tmp_path_factory.mktemp("grown")
    L.seed_everything(0, verbose=False)
    saving = ModelCheckpoint(root / "files", save_top_k=-1, filename="{epoch}")
    trainer = make_trainer(root, saving, TRAKCallback(root / "unused"), max_epochs=2)
    trainer.fit(Classifier(), datamodule=First(N))
    return sorted((root / "files").iterdir()), FeatureStore(root / "unused").manifest


def filled(root, trained, data):
    """Make a store in which a data set is featurized at two checkpoints, in chunks of 16."""
    files, manifest = trained
    own = {name: value for name, value in manifest.items() if name != "id"}
    own |= {"chunk_rows": 16, **fingerprint(data.train_set)}
    FeatureStore.create(root / "store", own)
    attributed(root, data, ckpt_path=files)


@pytest.fixture
def root(tmp_path, trained):
    """A folder with a store in which all N examples are featurized."""
    filled(tmp_path, trained, First(N))
    return tmp_path


def attributed(root, data, model=None, **kwargs):
    return fresh(root).attribute(model or Classifier(), TARGETS, data, **kwargs)


def counted(root, data):
    """Return scores, and how many examples went through the model."""
    Counting.rows = 0
    return attributed(root, data, Counting()).scores, Counting.rows


def chunks(root):
    return {path: path.stat().st_mtime_ns for path in root.glob("store/checkpoints/*/train/*.safetensors")}


@pytest.mark.parametrize("n", [41, 48, 49, 150])
def test_added_examples_get_the_scores_of_a_store_that_always_had_them(root, n):
    full = {path: time for path, time in chunks(root).items() if int(path.stem) + 16 <= N}
    found = attributed(root, First(n)).scores
    assert len(full) == 2 * 2
    assert full.items() <= chunks(root).items()
    assert not list(root.glob("store/checkpoints/*/former"))
    assert FeatureStore(root / "store").n_train == n
    torch.testing.assert_close(found, one_by_one(root, n), rtol=1e-4, atol=1e-6)


def one_by_one(root, n):
    """Return the scores after all chunks are computed again by the curvature that is there."""
    for path in chunks(root):
        path.unlink()
    return attributed(root, First(n)).scores


def test_the_rows_that_are_there_are_not_featurized_again(root):
    _, unchanged = counted(root, First(N))
    _, grown = counted(root, First(N + 7))
    _, again = counted(root, First(N + 7))
    assert 2 * 7 <= grown - again <= 2 * (7 + CHECKED) + 40  # more: an engine is tried, and half-filled stores checked
    assert again == unchanged


def test_the_store_says_that_it_grows(root, caplog):
    attributed(root, First(50))
    assert "the train set has 50 examples, of which the store" in caplog.text
    assert "knew the first 40: their features stay, and those of the other 10 are computed" in caplog.text


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (First(50, changed=3), "another train set: 40 examples, here 50"),
        (First(50, changed=39), "another train set: 40 examples, here 50"),
        (First(30), "another train set: 40 examples, here 30"),
    ],
)
def test_other_examples_are_still_an_error(root, data, match):
    manifest = (root / "store" / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=match):
        attributed(root, data)
    assert (root / "store" / "manifest.json").read_bytes() == manifest


def test_a_former_train_set_is_an_error_once_the_store_has_grown(root):
    attributed(root, First(50))
    with pytest.raises(ValueError, match="another train set: 50 examples, here 40"):
        attributed(root, First(N))


def test_a_dry_run_counts_added_examples_and_changes_nothing(root):
    before = {path: path.read_bytes() for path in root.glob("store/**/*") if path.is_file()}
    stages = {stage.name: stage for stage in attributed(root, First(50), dry_run=True).stages}
    row = fresh_row_bytes(root)
    assert stages["train set"].disk == 2 * 10 * row
    assert before == {path: path.read_bytes() for path in root.glob("store/**/*") if path.is_file()}


def fresh_row_bytes(root):
    """Return the bytes of a stored row, from the arrays of a chunk."""
    entry = next(iter(FeatureStore(root / "store")))
    arrays = entry.train.read(entry.train.all()[0])
    return sum(array[0].nbytes for array in arrays.values())


def test_a_growth_that_is_killed_before_the_manifest_loses_no_row(root):
    for entry in FeatureStore(root / "store"):
        entry.set_aside()
    found = attributed(root, First(N)).scores
    torch.testing.assert_close(found, one_by_one(root, N), rtol=1e-4, atol=1e-6)
    attributed(root, First(50))
    torch.testing.assert_close(attributed(root, First(50)).scores, one_by_one(root, 50), rtol=1e-4, atol=1e-6)


def test_a_chunk_of_the_former_size_that_a_running_process_writes_is_mended(root):
    former = {path: path.read_bytes() for path in chunks(root)}
    attributed(root, First(50))
    for path, content in former.items():
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged: it belongs elsewhere"):
        found = attributed(root, First(50)).scores
    torch.testing.assert_close(found, one_by_one(root, 50), rtol=1e-4, atol=1e-6)


def test_a_second_fit_may_have_more_examples(root):
    trainer = make_trainer(root / "more", TRAKCallback(root / "store"), max_epochs=1)
    trainer.fit(Classifier(), datamodule=First(64))
    attribution = trainer.attribute(dataloaders=TARGETS)
    assert len(attribution.info.checkpoints) == 3
    torch.testing.assert_close(attribution.scores, one_by_one(root, 64), rtol=1e-4, atol=1e-6)


def test_a_chunk_of_another_store_is_damaged(root, tmp_path_factory, trained):
    """Stores of the same settings have different names inside, although their data are not a part of these."""
    other = tmp_path_factory.mktemp("other")
    filled(other, trained, First(N, changed=2))
    for path in chunks(root):
        shutil.copyfile(other / path.relative_to(root), path)
    with pytest.warns(UserWarning, match="is damaged: it belongs elsewhere"):
        attributed(root, First(N))
