"""A store in an object store: what is read is what was copied there, or an error; nothing is written there."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from uuid import uuid4

import fsspec
import lightning as L
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import DataLoader

from lightning_trak import Attribution, FeatureStore, TRAKCallback
from lightning_trak.results.stored_scores import StoredScores
from lightning_trak.store.chunks import Claim
from lightning_trak.store.files import Damaged
from lightning_trak.store.remote import CACHE, NotFetched, ReadOnly, path_of
from tests.conftest import Blobs, Classifier, make_data, make_trainer
from tests.results.test_stored_scores import saved
from tests.store.processes import output_of, start
from tests.store.s3 import s3_server
from tests.store.test_store import FEATURES, MANIFEST, TERMS, WEIGHTS, complete_entry, fill

Usage = namedtuple("Usage", "total used free")


class Targets(L.LightningDataModule):
    """Has no train set."""

    def test_dataloader(self):
        return DataLoader(make_data(7, 2), 3)


def attributed(url, tmp_path, **kwargs):
    """Attribute in a process that has no more than the store's URL, the module, and targets."""
    trainer = make_trainer(tmp_path, TRAKCallback(url))
    return trainer.attribute(Classifier(), datamodule=Targets(), **kwargs)


@pytest.fixture(scope="module")
def server():
    """What a user of S3 sets, for a server of the tests' own."""
    with s3_server() as variables:
        yield variables


@pytest.fixture
def environment(server, monkeypatch, tmp_path):
    """The server, and a cache of the test's own."""
    for name, value in (server | {CACHE: str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["s3", "memory"])
def bucket(request, environment):
    """The URL of an empty bucket, or of an empty folder in memory."""
    url = f"{request.param}://b{uuid4().hex}"
    if request.param == "s3":
        fsspec.filesystem("s3").mkdir(url)
    return url


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """The URL of an empty folder in memory."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return f"memory://b{uuid4().hex}"


@pytest.fixture(scope="module", params=["kronecker", "none"])
def trained(request, tmp_path_factory):
    """A finished store, with saved scores; and the scores that are read from it there."""
    path = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(path, TRAKCallback(path / "store", preconditioner=request.param, proj_dim=8), max_epochs=2)
    trainer.fit(Classifier(), datamodule=Blobs())
    trainer.attribute(datamodule=Blobs(), name="saved")
    return path / "store", trainer.attribute(datamodule=Blobs())


def system_of(url):
    """As of another program: none of its listings are those of the package."""
    return fsspec.core.url_to_fs(url, skip_instance_cache=True)


def upload(folder, url):
    """Copy a folder as its own program would."""
    system, root = system_of(url)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            system.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def change(url, content):
    system, path = system_of(url)
    system.pipe_file(path, content)


def content_of(url):
    system, path = system_of(url)
    system.invalidate_cache()
    return system.cat_file(path)


def delete(url):
    system, path = system_of(url)
    system.rm_file(path)


def objects(url):
    """All that is in a bucket."""
    system, root = system_of(url)
    system.invalidate_cache()
    return {path: system.cat_file(path) for path in system.find(root)}


def small_store(path):
    """Fill a store of two chunks, and return it."""
    store = FeatureStore.create(path, MANIFEST)
    complete_entry(store)
    return store


def copies(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_same_scores_as_from_the_local_store(bucket, trained, tmp_path):
    """Bit for bit, without a train set, and with nothing written into the bucket or the working directory."""
    path, local = trained
    before = objects(upload(path, f"{bucket}/deep/store"))
    remote = attributed(f"{bucket}/deep/store", tmp_path)
    assert torch.equal(remote.scores, local.scores)
    assert remote.info == local.info
    assert torch.equal(remote.without([0, 1]), local.without([0, 1]))
    assert objects(f"{bucket}/deep/store") == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_self_influence_and_single_checkpoints(memory, trained, tmp_path):
    path, _ = trained
    url = upload(path, memory)
    local, remote = (make_trainer(tmp_path, TRAKCallback(place)) for place in (path, url))
    assert torch.equal(remote.attribute_self(Classifier()), local.attribute_self(Classifier(), datamodule=Blobs()))
    last = [trainer.attribute(Classifier(), datamodule=Targets(), ckpt_path="last") for trainer in (local, remote)]
    assert torch.equal(last[0].scores, last[1].scores)
    assert last[1].info.checkpoints == (FeatureStore(path).digests[-1],)


def test_a_train_set_that_is_given_is_compared(memory, trained, tmp_path):
    path, local = trained
    upload(path, memory)
    trainer = make_trainer(tmp_path, TRAKCallback(memory))
    same = Blobs()
    same.featurize_dataloader = lambda: DataLoader(make_data(40), 8)
    assert torch.equal(trainer.attribute(Classifier(), datamodule=same).scores, local.scores)
    other = Blobs()
    other.featurize_dataloader = lambda: DataLoader(make_data(40, seed=5), 8)
    with pytest.raises(ValueError, match="another train set"):
        trainer.attribute(Classifier(), datamodule=other)


def test_scores_are_read_by_url(bucket, trained):
    path, local = trained
    url = upload(path / "scores", f"{bucket}/store/scores")
    for place in (f"{url}/saved", f"{url}/saved/", path_of(url) / "saved"):
        read = Attribution.load(place)
        assert torch.equal(read.scores, local.scores)
        assert torch.equal(read.standard_error, local.standard_error)
        assert read.info == local.info
    with pytest.raises(FileNotFoundError, match=rf"{url}/other.*copy the folder there"):
        Attribution.load(f"{url}/other")


def test_large_scores_are_read_by_url(bucket, tmp_path):
    """Chunk by chunk."""
    local = saved(tmp_path)
    url = upload(tmp_path / "saved", f"{bucket}/large")
    read = Attribution.load(url)
    assert isinstance(read.scores, StoredScores)
    assert torch.equal(read.scores[4], local.scores[4])
    assert torch.equal(read.scores[:, 1:], local.scores[:, 1:])
    assert torch.equal(read.standard_error[:], local.standard_error[:])
    assert torch.equal(read.top(3).indices, local.top(3).indices)
    read.save(tmp_path / "again")
    assert torch.equal(Attribution.load(tmp_path / "again").scores[:], local.scores[:])
    chunk = next((tmp_path / "saved").glob("scores-*/0000000003.safetensors")).relative_to(tmp_path / "saved")
    content = content_of(f"{url}/{chunk}")
    change(f"{url}/{chunk}", content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(Damaged, match=rf"'{url}/{chunk}' is damaged.*Copy it again"):
        _ = Attribution.load(url).scores[:]
    delete(f"{url}/{chunk}")
    with pytest.raises(ValueError, match=rf"{url}.*some are missing"):
        Attribution.load(url)


def test_large_scores_are_computed_into_the_cache(memory, trained, tmp_path):
    """Once, unless the features in the bucket change."""
    path, local = trained
    before = objects(upload(path, memory))

    def computed():
        trainer = make_trainer(tmp_path, TRAKCallback(memory, memory_limit=0))
        found = trainer.attribute(Classifier(), datamodule=Targets()).scores
        assert isinstance(found, StoredScores)
        torch.testing.assert_close(found[:], local.scores)
        return {one: one.stat().st_mtime_ns for one in (tmp_path / "cache").rglob("scores-*/*.safetensors")}

    first = computed()
    assert len(first) == 1
    assert computed() == first
    assert objects(memory) == before
    upload(path / "checkpoints", f"{memory}/checkpoints")
    assert len(computed()) == 2


def test_a_second_call_featurizes_no_target(memory, trained, tmp_path):
    path, _ = trained
    before = objects(upload(path, memory))
    counts, found = [], []

    class Counting(Classifier):
        def forward(self, x):
            counts[-1] += len(x)
            return super().forward(x)

    for _ in range(2):
        counts.append(0)
        trainer = make_trainer(tmp_path, TRAKCallback(memory))
        found.append(trainer.attribute(Counting(), DataLoader(make_data(80, 2), 8)).scores)
    assert counts[0] - counts[1] > 80  # of two checkpoints, less those that are checked
    assert torch.equal(*found)
    assert objects(memory) == before


def test_what_an_attribution_takes_is_said(memory, trained, tmp_path):
    path, _ = trained
    upload(path, memory)
    trainer = make_trainer(tmp_path, TRAKCallback(memory))
    said = trainer.attribute(Classifier(), datamodule=Blobs(), dry_run=True)
    assert {stage.name for stage in said.stages} >= {"targets", "scores"}
    assert said.free > 0


def test_damaged_scores_are_an_error(memory, trained):
    path, _ = trained
    url = upload(path / "scores" / "saved", memory)
    (name,) = [one.name for one in (path / "scores" / "saved").glob("scores-*.npy")]
    content = content_of(f"{url}/{name}")
    change(f"{url}/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{url}.*checksum of {name}"):
        Attribution.load(url)
    change(f"{url}/{name}", content)
    Attribution.load(url)


@pytest.mark.parametrize("name", ["train/0000000000.safetensors", "weights.safetensors", "meta.json", "manifest.json"])
def test_a_damaged_object_is_an_error_with_its_url(bucket, trained, tmp_path, name):
    """It is no other number, it is not deleted, and when it is mended the damaged copy is not in the way."""
    path, local = trained
    url = upload(path, f"{bucket}/store")
    digest = FeatureStore(path).digests[0]
    damaged = f"{url}/{name}" if name == "manifest.json" else f"{url}/checkpoints/{digest}/{name}"
    content = content_of(damaged)
    place = len(content) - 3 if name.endswith(".safetensors") else content.index(b"0") if b"0" in content else 9
    wrong = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    for bad in (wrong, content[: len(content) // 2], b""):
        change(damaged, bad)
        with pytest.raises(Damaged, match=rf"'{damaged}' is damaged.*Copy it again"):
            attributed(url, tmp_path)
        assert content_of(damaged) == bad
    change(damaged, content)
    assert torch.equal(attributed(url, tmp_path).scores, local.scores)


def test_a_file_of_another_store_is_an_error(memory, tmp_path):
    """As where two stores were copied to one URL."""
    small_store(tmp_path / "one")
    complete_entry(FeatureStore.create(tmp_path / "other", {**MANIFEST, "data": "other"}))
    upload(tmp_path / "one", memory)
    chunk = "checkpoints/d1/train/0000000004.safetensors"
    change(f"{memory}/{chunk}", (tmp_path / "other" / chunk).read_bytes())
    with pytest.raises(Damaged, match=rf"{memory}/{chunk}.*belongs elsewhere"):
        _ = FeatureStore(memory)["d1"].features
    upload(tmp_path / "other" / "checkpoints", f"{memory}/checkpoints")
    with pytest.raises(Damaged, match=r"meta\.json.*another store"):
        list(FeatureStore(memory))


def test_missing_features_are_not_computed(bucket, trained, tmp_path):
    path, _ = trained
    url = upload(path, f"{bucket}/store")
    delete(f"{url}/checkpoints/{FeatureStore(path).digests[0]}/train/0000000000.safetensors")
    before = objects(url)
    with pytest.raises(ReadOnly, match=rf"{url}.*not written.*TRAKCallback\('attributions'\).*aws s3 sync"):
        make_trainer(tmp_path, TRAKCallback(url)).attribute(Classifier(), datamodule=Blobs())
    with pytest.raises(ReadOnly, match=url):  # without a train set too
        attributed(url, tmp_path)
    assert objects(url) == before


@pytest.mark.parametrize("name", ["weights.safetensors", "meta.json"])
def test_half_a_checkpoint_is_an_error(memory, trained, tmp_path, name):
    path, _ = trained
    url = upload(path, memory)
    missing = f"{url}/checkpoints/{FeatureStore(path).digests[0]}/{name}"
    delete(missing)
    with pytest.raises(Damaged, match=rf"{missing}.*Copy it again"):
        attributed(url, tmp_path)


def test_an_object_that_vanishes_is_missing(memory, tmp_path):
    """After the folder was listed."""
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)
    entry = FeatureStore(memory)["d1"]
    assert entry.complete
    delete(f"{memory}/checkpoints/d1/train/0000000004.safetensors")
    with pytest.raises(Damaged, match=rf"{memory}/checkpoints/d1/train/0000000004.safetensors.*it is missing"):
        _ = entry.features


def test_training_into_a_url_is_refused_before_it_begins(memory, trained, tmp_path):
    path, _ = trained
    steps = []
    module = Classifier()
    module.on_train_batch_start = module.on_validation_batch_start = lambda *_: steps.append(1)
    for url in (memory, upload(path, f"{memory}/finished")):
        for overwrite in (False, True):
            trainer = make_trainer(tmp_path, TRAKCallback(url, overwrite=overwrite))
            with pytest.raises(ReadOnly, match=rf"{url}.*local folder"):
                trainer.fit(module, datamodule=Blobs())
    with pytest.raises(ReadOnly, match=rf"{memory}/trak"):
        make_trainer(memory, TRAKCallback()).fit(module, datamodule=Blobs())
    assert not steps
    assert not list(tmp_path.glob("memory:*"))


def test_checkpoint_files_are_not_added(memory, trained, tmp_path):
    """One that the store has may be named."""
    path, _ = trained
    url = upload(path, memory)
    store = FeatureStore(path)
    trainer = make_trainer(tmp_path, TRAKCallback(url))
    known = store[store.digests[0]].weights_path
    found = trainer.attribute(Classifier(), datamodule=Targets(), ckpt_path=known)
    assert found.info.checkpoints == (store.digests[0],)
    torch.save(Classifier().state_dict(), tmp_path / "new.pt")
    with pytest.raises(ReadOnly, match=url):
        trainer.attribute(Classifier(), datamodule=Blobs(), ckpt_path=tmp_path / "new.pt")
    empty = make_trainer(tmp_path, TRAKCallback(f"{memory}-empty"))
    with pytest.raises(ReadOnly, match=f"{memory}-empty"):
        empty.attribute(Classifier(), datamodule=Blobs(), ckpt_path=tmp_path / "new.pt")


def test_scores_are_returned_but_not_saved(memory, trained, tmp_path):
    path, local = trained
    url = upload(path, memory)
    before = objects(url)
    with pytest.warns(UserWarning, match=rf"could not be saved as 'new'.*{url}/scores/new"):
        found = attributed(url, tmp_path, name="new")
    assert torch.equal(found.scores, local.scores)
    with pytest.raises(ReadOnly, match=f"{url}/mine"):
        found.save(f"{url}/mine")
    assert objects(url) == before


def test_nothing_is_written(memory, tmp_path):
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)
    before = objects(memory)
    store = FeatureStore(memory)
    entry = store["d1"]
    attempts = [
        lambda: FeatureStore.create(memory, MANIFEST),
        lambda: FeatureStore.remove(memory),
        lambda: store.add("d2", {}, WEIGHTS),
        lambda: store.discard("d1"),
        lambda: entry.supplement({"run": "new"}),
        lambda: entry.write_whitening({}, {}),
        lambda: entry.locked("work").__enter__(),
        lambda: entry.train.write(0, FEATURES),
        entry.check_writable,
    ]
    for attempt in attempts:
        with pytest.raises(ReadOnly, match=memory):
            attempt()
    entry.supplement({"epoch": 3})  # it is known
    assert store.add("d1", {"epoch": 3}, WEIGHTS).meta["epoch"] == 1
    delete(f"{memory}/checkpoints/d1/train/0000000004.safetensors")
    with pytest.raises(ReadOnly, match=memory), Claim(FeatureStore(memory)["d1"].train) as claim:
        list(claim)
    chunk = f"{memory}/checkpoints/d1/train/0000000000.safetensors"
    change(chunk, b"damaged")
    with pytest.raises(ReadOnly, match=memory):
        FeatureStore(memory)["d1"].delete_damaged(path_of(chunk))
    assert content_of(chunk) == b"damaged"
    assert len(objects(memory)) == len(before) - 1


def test_no_bucket_and_no_store(environment, bucket, tmp_path):
    scheme = bucket.partition(":")[0]
    for url in (f"{scheme}://none{uuid4().hex}/store", f"{bucket}/store"):
        with pytest.raises(FileNotFoundError, match=rf"no feature store in '{url}'.*Check the URL"):
            FeatureStore(url)
        with pytest.raises(FileNotFoundError, match=rf"no feature store in '{url}'.*Check the URL"):
            attributed(url, tmp_path)


def test_the_package_for_a_protocol_is_named():
    script = """
        sys.modules["s3fs"] = sys.modules["gcsfs"] = None
        from lightning_trak.store.store import FeatureStore
        for url in ("s3://bucket/store", "gs://bucket/store"):
            try:
                FeatureStore(url)
            except ImportError as error:
                print(error)
    """
    s3, gs = output_of(script).splitlines()
    assert re.search(r"'s3://bucket/store'.*pip install s3fs$", s3)
    assert re.search(r"'gs://bucket/store'.*pip install gcsfs$", gs)


def test_unknown_protocols_are_refused():
    with pytest.raises(ValueError, match=r"'s4://bucket/store' cannot be read.*s3://"):
        FeatureStore("s4://bucket/store")


class Unversioned(MemoryFileSystem):
    """Says of a file no more than its name and size."""

    protocol = "unversioned"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("unversioned:", "memory:"))

    def ls(self, path, detail=True, **kwargs):
        return [{name: entry[name] for name in ("name", "size", "type")} for entry in super().ls(path, **kwargs)]


def test_without_versions_nothing_is_taken_for_unchanged(memory, tmp_path):
    """A copy could be an old one."""
    fsspec.register_implementation("unversioned", Unversioned, clobber=True)
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)
    with pytest.raises(ValueError, match="nothing says whether a file there has changed"):
        FeatureStore(memory.replace("memory", "unversioned"))


def test_urls_that_pathlib_has_changed_are_refused():
    for url in (Path("s3://bucket/store"), "gs:/bucket/store"):
        for use in (TRAKCallback, FeatureStore, Attribution.load):
            with pytest.raises(ValueError, match=r"one slash.*string"):
                use(url)


def test_urls_of_local_files_are_paths(tmp_path):
    small_store(tmp_path / "store")
    assert FeatureStore((tmp_path / "store").as_uri()).dirpath == tmp_path / "store"
    assert FeatureStore(f"local://{tmp_path}/store").dirpath == tmp_path / "store"
    assert TRAKCallback(tmp_path / "store").dirpath == tmp_path / "store"


def test_a_file_is_fetched_once(memory, trained, tmp_path, monkeypatch):
    path, _ = trained
    url = upload(path, memory)
    fetched = []
    original = MemoryFileSystem.get_file

    def get_file(self, rpath, *args, **kwargs):
        fetched.append(rpath)
        return original(self, rpath, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    first = attributed(url, tmp_path)
    assert len(fetched) == len({*fetched})
    assert {one.rpartition("/")[2] for one in fetched} >= {"manifest.json", "meta.json", "weights.safetensors"}
    fetched.clear()
    assert torch.equal(attributed(url, tmp_path).scores, first.scores)
    assert not fetched


def test_chunks_are_fetched_together(memory, tmp_path, monkeypatch):
    """One by one, each would wait for the answer of the one before."""
    store = FeatureStore.create(tmp_path / "store", {**MANIFEST, "n_train": 40, "chunk_rows": 1})
    fill(store.add("d1", {}, WEIGHTS), {"features": np.zeros((40, 2), np.float32)})
    upload(tmp_path / "store", memory)
    entry, calls = FeatureStore(memory)["d1"], []
    original = MemoryFileSystem.get

    def get(self, rpath, *args, **kwargs):
        calls.append(len(rpath))
        return original(self, rpath, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get", get)
    assert entry.features.shape == (40, 2)
    assert calls == [16, 16, 8]


def test_a_changed_store_is_read_anew(bucket, tmp_path):
    """Of the same settings and weights, so that nothing but the content differs."""
    one = small_store(tmp_path / "one")
    upload(tmp_path / "one", f"{bucket}/store")
    read = FeatureStore(f"{bucket}/store")["d1"]
    np.testing.assert_array_equal(read.features, FEATURES["features"])
    read.write_sums({"key": 1}, {"sum": np.ones(1)})
    other = FeatureStore.create(tmp_path / "other", {**MANIFEST, "id": one.manifest["id"]})
    fill(other.add("d1", {"epoch": 2}, WEIGHTS), {"features": FEATURES["features"] + 1, **TERMS})
    assert other.identity == one.identity
    upload(tmp_path / "other", f"{bucket}/store")
    anew = FeatureStore(f"{bucket}/store")["d1"]
    np.testing.assert_array_equal(anew.features, FEATURES["features"] + 1)
    assert anew.meta["epoch"] == 2
    assert anew.read_sums({"key": 1}) is None


def test_sums_are_kept_in_the_cache(memory, tmp_path):
    """Those that were copied along are read as well."""
    store = small_store(tmp_path / "store")
    store["d1"].write_sums({"key": 0}, {"sum": np.zeros(1)})
    upload(tmp_path / "store", memory)
    before = objects(memory)
    assert FeatureStore(memory)["d1"].read_sums({"key": 0})["sum"] == 0
    assert FeatureStore(memory)["d1"].read_sums({"key": 1}) is None
    FeatureStore(memory)["d1"].write_sums({"key": 1}, {"sum": np.ones(1)})
    assert FeatureStore(memory)["d1"].read_sums({"key": 1})["sum"] == 1
    assert objects(memory) == before
    shutil.rmtree(tmp_path / "cache")
    assert FeatureStore(memory)["d1"].read_sums({"key": 1}) is None


def test_a_damaged_copy_is_fetched_again(memory, trained, tmp_path):
    """And what was computed is computed again."""
    path, local = trained
    url = upload(path, memory)
    attributed(url, tmp_path)
    for damage in (lambda content: content[:-1] + bytes([content[-1] ^ 1]), lambda content: b""):
        for copy in copies(tmp_path):
            copy.write_bytes(damage(copy.read_bytes()))
        of_targets = pytest.warns(UserWarning, match=r"targets.* is damaged: .* files are computed again")
        with of_targets, pytest.warns(UserWarning, match=r"scores-.* is damaged: .* It is computed again"):
            assert torch.equal(attributed(url, tmp_path).scores, local.scores)


def test_a_copy_that_breaks_off_leaves_nothing(memory, tmp_path, monkeypatch):
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)

    def get_file(self, rpath, lpath, **kwargs):
        Path(lpath).write_bytes(self.cat_file(rpath)[:-5])
        raise ConnectionError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", get_file)
        with pytest.raises(NotFetched, match=rf"'{memory}' cannot be read: ConnectionError: broken off"):
            FeatureStore(memory)
    assert not copies(tmp_path)
    np.testing.assert_array_equal(FeatureStore(memory)["d1"].features, FEATURES["features"])


def test_the_oldest_copies_make_room(memory, tmp_path, monkeypatch):
    """On a disk that is too small for all; files that are no copies stay."""
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)
    _ = FeatureStore(memory)["d1"].features
    FeatureStore(memory)["d1"].write_sums({"key": 1}, {"sum": np.ones(1)})
    before = {*copies(tmp_path)}
    own = tmp_path / "cache" / "mine" / "file"
    own.parent.mkdir()
    own.write_text("mine")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 0))
    small_store(tmp_path / "second")
    upload(tmp_path / "second", f"{memory}-second")
    entry = FeatureStore(f"{memory}-second")["d1"]
    np.testing.assert_array_equal(entry.features, FEATURES["features"])
    np.testing.assert_array_equal(entry.features, FEATURES["features"])
    assert own.read_text() == "mine"
    (left,) = before & {*copies(tmp_path)}
    assert left.name.startswith("sums-")


def test_room_is_made_for_large_files(memory, tmp_path, monkeypatch):
    """The disk has space for a small file alone."""
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)
    FeatureStore(memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**31, 0, 2**30 + 10_000))
    change(f"{memory}/small", bytes(9_000))
    (path_of(memory) / "small").read_bytes()
    older, newer = sorted(copies(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    os.truncate(older, 2**31)  # so large that nothing else need go
    os.utime(older, (0, 0))
    change(f"{memory}/large", bytes(11_000))
    (path_of(memory) / "large").read_bytes()
    assert newer in copies(tmp_path)
    assert older not in copies(tmp_path)
    assert len(copies(tmp_path)) == 2


def test_scores_from_a_disk_without_room(memory, trained, tmp_path, monkeypatch):
    path, local = trained
    url = upload(path, memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 0))
    with pytest.warns(UserWarning, match=r"Scores could not be stored.* No space left"):
        assert torch.equal(attributed(url, tmp_path).scores, local.scores)


def test_a_cache_that_cannot_be_written_is_named(memory, tmp_path, monkeypatch):
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    with pytest.raises(NotFetched, match=rf"'{memory}' cannot be read: NotADirectoryError.*/file/.*{CACHE}"):
        FeatureStore(memory)


def test_what_is_not_permitted_is_said(memory, trained, monkeypatch):
    """It is neither an empty folder nor damage."""
    path, _ = trained
    upload(path, memory)

    def ls(self, path, **kwargs):
        raise PermissionError(errno.EACCES, "Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    for read, url in ((FeatureStore, memory), (Attribution.load, f"{memory}/scores/saved")):
        with pytest.raises(NotFetched, match=rf"'{url}' cannot be read: PermissionError.*Access Denied.*permissions"):
            read(url)


def test_the_cache_of_the_user(memory, tmp_path, monkeypatch):
    """Where no other is named."""
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    FeatureStore(memory)
    assert list((tmp_path / "xdg" / "lightning_trak").iterdir())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    FeatureStore(memory)
    assert list((tmp_path / "home" / ".cache" / "lightning_trak").iterdir())


def test_processes_share_a_cache(environment, tmp_path):
    """They read at the same time, and none sees what another has not finished."""
    url = f"s3://b{uuid4().hex}"
    fsspec.filesystem("s3").mkdir(url)
    store = FeatureStore.create(tmp_path / "store", {**MANIFEST, "n_train": 60, "chunk_rows": 1})
    features = np.arange(60 * 5000, dtype=np.float32).reshape(60, 5000)
    fill(store.add("d1", {}, WEIGHTS), {"features": features})
    upload(tmp_path / "store", url)
    script = """
        from lightning_trak.store.store import FeatureStore
        print("ready", flush=True)
        sys.stdin.readline()
        print(float(FeatureStore(sys.argv[1])["d1"].features.sum(dtype=np.float64)))
    """
    processes = [start(script, url) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    sums = [float(process.communicate()[0]) for process in processes]
    assert sums == [features.sum(dtype=np.float64)] * 3
    assert len(copies(tmp_path)) == 60 + 2  # manifest and meta


_RANKS = """
import sys
import warnings
import lightning as L
import torch
from lightning_trak import TRAKCallback
from tests.conftest import Classifier
from tests.store.test_remote import Targets
warnings.simplefilter("ignore")
url, folder = sys.argv[1:]
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[TRAKCallback(url)], logger=False,
                    enable_progress_bar=False, default_root_dir=folder)
scores = trainer.attribute(Classifier(), datamodule=Targets()).scores
torch.save(scores, f"{folder}/scores-{trainer.global_rank}.pt")
"""


@pytest.mark.parametrize("trained", ["kronecker"], indirect=True)
def test_ranks_share_the_targets_in_the_cache(environment, trained, tmp_path):
    path, local = trained
    url = f"s3://b{uuid4().hex}"
    fsspec.filesystem("s3").mkdir(url)
    before = objects(upload(path, url))
    (tmp_path / "program.py").write_text(_RANKS)
    variables = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    variables["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), variables.get("PYTHONPATH", "")])
    command = [sys.executable, tmp_path / "program.py", url, tmp_path]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"scores-{rank}.pt"), local.scores, rtol=1e-3, atol=1e-5)
    assert objects(url) == before
    (folder,) = (tmp_path / "cache").rglob("targets")
    assert (
        len(list(folder.glob("*/*/*.safetensors"))) == 2 * 7 + 1
    )  # one for each target at each checkpoint, and scores


def test_paths_are_pickled_without_their_connection(memory, tmp_path):
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)
    store = FeatureStore(memory)
    assert store["d1"].complete
    path = pickle.loads(pickle.dumps(store["d1"].path))
    assert path == store["d1"].path
    assert (path / "meta.json").read_bytes() == (tmp_path / "store/checkpoints/d1/meta.json").read_bytes()


def test_what_is_of_the_path(memory, tmp_path):
    """As `pathlib.Path` says of the same folder."""
    small_store(tmp_path / "store")
    upload(tmp_path / "store", memory)
    local, remote = tmp_path / "store", path_of(memory)
    for name in ("manifest.json", "checkpoints", "checkpoints/d1", "checkpoints/d1/train", "none", "none/none"):
        for question in ("exists", "is_file", "is_dir"):
            assert getattr(remote / name, question)() == getattr(local / name, question)()
        assert (remote / name).name == (local / name).name
        assert str((remote / name).parent) == f"{memory}/{(local / name).parent.relative_to(local)}".removesuffix("/.")
    assert remote.exists()
    assert not path_of(f"{memory}-none").exists()
    assert {path.name for path in remote.iterdir()} >= {"manifest.json", "checkpoints"}
    for pattern in ("checkpoints/*/weights.safetensors", "*.json", "none/*"):
        assert [path.name for path in remote.glob(pattern)] == [path.name for path in local.glob(pattern)]
    with pytest.raises(FileNotFoundError, match=f"{memory}/none"):
        (remote / "none").read_bytes()
    with pytest.raises(FileNotFoundError, match=f"{memory}/checkpoints"):
        (remote / "checkpoints").read_bytes()
