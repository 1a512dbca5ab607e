"""FeatureStore: nothing lost, nothing mixed, damage noticed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections import namedtuple

import numpy as np
import pytest
import torch

from lightning_trak import FeatureStore
from lightning_trak.store.checkpoint import META
from lightning_trak.store.chunks import Claim, rows_in_a_chunk
from lightning_trak.store.files import Damaged, check_space, read_json
from tests.store.processes import output_of, start

MANIFEST = {
    "n_train": 6,
    "parameters": {"net.weight": [2, 3]},
    "projection": {"projector": "sparse", "proj_dim": 4, "seed": 0},
    "data": "abc",
    "chunk_rows": 4,
}
WEIGHTS = {"net.weight": torch.arange(6.0).view(2, 3)}
RNG = np.random.default_rng(0)
TERMS = {name: RNG.normal(size=6).astype(np.float32) for name in ("loss_grad", "curvature", "outputs")}
FEATURES = {"features": RNG.normal(size=(6, 4)).astype(np.float32), **TERMS}
LARGEST = {"values": RNG.normal(size=(6, 2)).astype(np.float16), "indices": RNG.integers(9, size=(6, 2)), **TERMS}


def fill(entry, arrays=FEATURES):
    with Claim(entry.train) as claim:
        rows = list(claim)
        claim.write(rows, {name: array[rows] for name, array in arrays.items()})
    return rows


def complete_entry(store, digest="d1"):
    entry = store.add(digest, {"epoch": 1}, WEIGHTS)
    assert fill(entry) == list(range(6))
    return entry


def assert_holds_everything(entry):
    np.testing.assert_array_equal(entry.features, FEATURES["features"], strict=True)
    np.testing.assert_array_equal(entry.loss_grad, FEATURES["loss_grad"], strict=True)
    np.testing.assert_array_equal(entry.curvature, FEATURES["curvature"], strict=True)


def flip(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_layout_on_disk(tmp_path):
    store = FeatureStore.create(tmp_path / "s", MANIFEST)
    entry = complete_entry(store)
    own = {"format_version": 2, "id": store.manifest["id"]}
    assert read_json(tmp_path / "s" / "manifest.json") == {**own, **MANIFEST}
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["n_train"] == 6
    assert entry.path == tmp_path / "s" / "checkpoints" / "d1"
    names = {path.name for path in entry.path.iterdir()}
    assert names == {"weights.safetensors", "meta.json", "train"}
    assert entry.weights_path == entry.path / "weights.safetensors"
    chunks = {path.name for path in (entry.path / "train").iterdir()}
    assert chunks == {"0000000000.safetensors", "0000000004.safetensors"}
    assert store.scores_dir("x") == tmp_path / "s" / "scores" / "x"


def test_resume_in_another_object(tmp_path):
    entry = FeatureStore.create(tmp_path, MANIFEST).add("d", {}, WEIGHTS)
    assert not entry.complete
    entry.train.write(4, {name: array[4:] for name, array in FEATURES.items()})
    again = FeatureStore.create(tmp_path, MANIFEST)["d"]
    assert again.train.missing() == [range(4)]
    assert fill(again) == [0, 1, 2, 3]
    assert entry.complete
    assert_holds_everything(FeatureStore(tmp_path)["d"])


def test_features_are_used_only_when_all_are_there(tmp_path):
    entry = FeatureStore.create(tmp_path, MANIFEST).add("d", {}, WEIGHTS)
    entry.train.write(0, {name: array[:4] for name, array in FEATURES.items()})
    for name in ("features", "loss_grad", "curvature"):
        with pytest.raises(ValueError, match="Checkpoint d has features of 4 of 6 training examples"):
            getattr(entry, name)


def test_the_largest_entries_come_by_name(tmp_path):
    entry = FeatureStore.create(tmp_path, MANIFEST).add("d", {}, WEIGHTS)
    fill(entry, LARGEST)
    found = entry.features
    assert set(found) == {"values", "indices"}
    np.testing.assert_array_equal(found["values"], LARGEST["values"], strict=True)


def test_a_killed_process_loses_only_the_chunks_that_are_not_written(tmp_path):
    store = FeatureStore.create(tmp_path, {**MANIFEST, "chunk_rows": 2})
    entry = store.add("d", {}, WEIGHTS)
    script = """
        from lightning_trak.store.checkpoint import CheckpointEntry
        entry = CheckpointEntry(Path(sys.argv[1]), sys.argv[2], 6, 2)
        with Claim(entry.train) as claim:
            for row in claim:
                claim.write([row], {"features": np.full((1, 4), row), "loss_grad": np.full(1, row)})
                if row == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
        """
    with start(script, entry.path, store.identity) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    entry = FeatureStore(tmp_path)["d"]
    assert entry.train.missing() == [range(4, 6)]
    assert fill(entry, {"features": np.full((6, 4), 7), "loss_grad": np.full(6, 7)}) == [4, 5]
    assert entry.features.tolist() == [[row] * 4 for row in (0, 1, 2, 3, 7, 7)]
    assert entry.loss_grad.tolist() == [0, 1, 2, 3, 7, 7]


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("n_train", {"n_train": 7}, "another train set: 6 examples, here 7: "),
        ("data", {"data": "other"}, "another train set: as many examples as here, 6, with other content: "),
        (
            "seed",
            {"projection": {**MANIFEST["projection"], "seed": 1}},
            "projection.seed=0, but here projection.seed=1",
        ),
        ("proj_dim", {"projection": {**MANIFEST["projection"], "proj_dim": 8}}, "projection.proj_dim=4, but here"),
        ("projector", {"projection": {**MANIFEST["projection"], "projector": "x"}}, 'projector="sparse", but here'),
        ("shape", {"parameters": {"net.weight": [3, 3]}}, r"parameters.net.weight=\[2, 3\], but here"),
        ("fewer", {"parameters": {}}, r"parameters.net.weight=\[2, 3\], but here parameters.net.weight=null"),
        ("more", {"parameters": {"net.weight": [2, 3], "b": [1]}}, "parameters.b=null, but here"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, field, change, message):
    FeatureStore.create(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match=f"{message}.*another dirpath"):
        FeatureStore.create(tmp_path, {**MANIFEST, **change})
    assert FeatureStore(tmp_path).manifest["n_train"] == 6


def test_another_order_of_parameters_is_refused(tmp_path):
    FeatureStore.create(tmp_path, {**MANIFEST, "parameters": {"a": [1], "b": [1]}})
    with pytest.raises(ValueError, match="parameters in another order"):
        FeatureStore.create(tmp_path, {**MANIFEST, "parameters": {"b": [1], "a": [1]}})


def test_the_number_of_rows_in_a_chunk_is_that_of_the_store(tmp_path):
    """It may depend on how fast a machine is: another machine must not be refused."""
    entry = complete_entry(FeatureStore.create(tmp_path, MANIFEST))
    again = FeatureStore.create(tmp_path, {**MANIFEST, "chunk_rows": 1})
    assert again.manifest["chunk_rows"] == 4
    assert again["d1"].train.all() == entry.train.all() == [range(4), range(4, 6)]
    assert_holds_everything(again["d1"])


def test_rows_in_a_chunk():
    assert rows_in_a_chunk(2**30, 100) == 1
    assert rows_in_a_chunk(2**11, 100, seconds=1e-6) == 2**10
    assert rows_in_a_chunk(2**11, 100, seconds=600.0) == 1
    assert rows_in_a_chunk(2**11, 100) == 64
    assert rows_in_a_chunk(2**11, 128 * 200) == 200
    assert rows_in_a_chunk(2**11, 128 * 2000) == 2**10


def test_checkpoints_are_one_each_in_the_order_of_arrival(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    for digest in ("zz", "aa", "mm", "aa"):
        store.add(digest, {"epoch": 0}, WEIGHTS)
    assert store.digests == ["zz", "aa", "mm"]
    assert [entry.digest for entry in store] == ["aa", "mm", "zz"]
    assert len(store) == 3
    assert "aa" in store
    fill(store["zz"])
    store.discard("aa")
    assert store.digests == ["zz", "mm"]
    with pytest.raises(KeyError, match="has no checkpoint aa"):
        store["aa"]
    assert repr(store).startswith(f"FeatureStore('{tmp_path}', n_train=6, checkpoints=2, featurized=1")


def test_what_is_learned_of_a_checkpoint_later_is_added_and_does_not_change(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    store.add("d", {"epoch": 1, "run": None}, WEIGHTS)
    one, other = store["d"], store["d"]
    one.supplement({"logistic": False, "run": "a"})
    other.supplement({"n_trainable": 3})  # which does not know of the first
    other.supplement({"logistic": True})
    store.add("d", {"epoch": 2, "file": "x.ckpt", "run": None}, {})
    known = {"epoch": 1, "logistic": False, "run": "a", "n_trainable": 3, "file": "x.ckpt"}
    meta = FeatureStore(tmp_path)["d"].meta
    assert {name: meta[name] for name in known} == known
    assert "created" in meta
    before = (one.path / META).stat().st_mtime_ns
    store.add("d", {"epoch": 5}, WEIGHTS)
    assert (one.path / META).stat().st_mtime_ns == before


def test_a_checkpoint_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    store = FeatureStore.create(tmp_path, MANIFEST)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match=r"cannot be written.*No space left.*Free space there"):
            store.add("d", {}, WEIGHTS)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    with pytest.raises(TypeError, match="complex128"):
        store.add("d", {}, {"a": torch.ones(2, dtype=torch.complex128)})
    assert list((tmp_path / "checkpoints").iterdir()) == []
    (tmp_path / "checkpoints" / "d.0f.partial").mkdir()  # of a process that was killed
    (tmp_path / "checkpoints" / "notes.txt").write_text("")
    assert list(store) == []
    assert len(store) == 0
    store.add("d", {}, WEIGHTS)
    assert store.digests == ["d"]


def test_files_of_another_store_or_checkpoint_are_damaged(tmp_path):
    one = FeatureStore.create(tmp_path / "one", MANIFEST)
    other = FeatureStore.create(tmp_path / "other", {**MANIFEST, "data": "other"})
    complete_entry(one, "d1")
    complete_entry(other, "d2")
    shutil.copytree(one["d1"].path, other.dirpath / "checkpoints" / "d1")
    with pytest.raises(Damaged, match="meta.json' is damaged: it is of another checkpoint or of another store"):
        other["d1"]
    other.discard("d1")
    shutil.copytree(one["d1"].path, one.dirpath / "checkpoints" / "d2")
    with pytest.raises(Damaged, match="meta.json' is damaged: it is of another checkpoint or of another store"):
        list(one)
    for name in ("train", "weights.safetensors"):
        path = other["d2"].path / name
        assert path.exists()
    shutil.rmtree(other["d2"].path / "train")
    shutil.copytree(one["d1"].path / "train", other["d2"].path / "train")
    with pytest.raises(Damaged, match="safetensors' is damaged: it belongs elsewhere"):
        other["d2"].features  # noqa: B018


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no feature store.*TRAKCallback"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "pickled", "gone", "short"])
def test_damaged_features_are_noticed_and_computed_again(tmp_path, damage):
    store = FeatureStore.create(tmp_path, MANIFEST)
    path = complete_entry(store).train.path(4)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "flipped":
        content = path.read_bytes()
        flip(path, content.index(FEATURES["features"][4:].tobytes()))
    elif damage == "pickled":
        with open(path, "wb") as file:
            np.save(file, np.array([{}] * 6, dtype=object), allow_pickle=True)
    elif damage == "short":
        path.write_bytes(store["d1"].train.path(0).read_bytes())
    else:
        path.unlink()
    entry = FeatureStore(tmp_path)["d1"]
    if damage == "gone":
        assert not entry.complete
    else:
        with pytest.raises(Damaged, match=r"0000000004.safetensors' is damaged.*computes its rows again"):
            entry.features  # noqa: B018
    assert entry.delete_damaged(path) == ([] if damage == "gone" else [path])
    assert fill(entry) == [4, 5]
    assert_holds_everything(entry)


def test_missing_files_of_a_checkpoint(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    entry = complete_entry(store)
    entry.weights_path.unlink()
    for read in (lambda: store["d1"], lambda: list(store), lambda: repr(store), lambda: store.digests):
        with pytest.raises(Damaged, match=r"weights.safetensors' is damaged: it is missing.*Delete the folder"):
            read()
    (entry.path / META).unlink()
    with pytest.raises(Damaged, match=r"meta.json' is damaged: it is missing.*Delete the folder"):
        list(store)


def test_sums_are_those_of_their_key_and_features(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    entry = complete_entry(store)
    sums = {"matrix": np.eye(4), "squares": np.array(2.0)}
    assert entry.read_sums({"curvature": True}) is None
    entry.write_sums({"curvature": True}, sums)
    found = FeatureStore(tmp_path)["d1"].read_sums({"curvature": True})
    assert set(found) == set(sums)
    for name, array in sums.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert entry.read_sums({"curvature": False}) is None
    entry.write_sums({"curvature": False}, {"matrix": np.zeros(3)})
    one, other = entry.path.glob("sums-*.safetensors")
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)  # they changed places
    assert entry.read_sums({"curvature": True}) is None
    assert entry.read_sums({"curvature": False}) is None
    entry.write_sums({}, sums)
    (path,) = set(entry.path.glob("sums-*.safetensors")) - {one, other}
    shutil.copy(path, complete_entry(store, "d2").path)
    assert store["d2"].read_sums({}) is None
    entry.write_whitening({"factor": np.eye(2)}, {})  # to which other features belong
    assert entry.read_sums({}) is None


@pytest.mark.parametrize("place", range(0, 400, 5))
def test_damaged_sums_are_none(tmp_path_factory, place):
    store = tmp_path_factory.getbasetemp() / "sums"  # one for all
    entry = FeatureStore.create(store, MANIFEST).add("d", {}, WEIGHTS)
    sums = {"upper": np.eye(4), "numbers": np.arange(3.0)}
    entry.write_sums({}, sums)
    (path,) = entry.path.glob("sums-*.safetensors")
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 255
    path.write_bytes(content)
    found = entry.read_sums({})
    if found is not None:  # what was damaged was not read
        for name, array in sums.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
    for other in (content[:-20], b"", b"garbage"):
        path.write_bytes(other)
        assert entry.read_sums({}) is None


def test_features_belong_to_the_curvature_by_which_they_are_whitened(tmp_path):
    entry = FeatureStore.create(tmp_path, MANIFEST).add("d", {}, WEIGHTS)
    assert entry.whitening_notes == {}
    with pytest.raises(Damaged, match="whitening.safetensors' is damaged: it is missing"):
        entry.read_whitening()
    curvature, notes = {"factor": np.eye(2), "number": np.array(3.0)}, {"damping": 0.5, "eigenvalues": [1.0]}
    entry.write_whitening(curvature, notes)
    fill(entry, LARGEST)
    again = FeatureStore(tmp_path)["d"]
    found = again.read_whitening()
    assert set(found) == set(curvature)
    for name, array in curvature.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert again.whitening_notes == notes
    assert set(again.features) == {"values", "indices"}
    entry.write_whitening(curvature, notes)  # the same once more is another
    with pytest.raises(Damaged, match="it belongs elsewhere"):
        again.features  # noqa: B018
    assert again.delete_damaged(again.train.path(0)) == [again.train.path(0), again.train.path(4)]
    assert fill(again, LARGEST) == list(range(6))


@pytest.mark.parametrize("place", [-1, 300, 10])
def test_a_damaged_curvature_is_deleted_with_the_features_that_belong_to_it(tmp_path, place):
    entry = FeatureStore.create(tmp_path, MANIFEST).add("d", {}, WEIGHTS)
    entry.write_whitening({"factor": np.arange(64.0)}, {"damping": 0.5})
    fill(entry, LARGEST)
    path = entry.path / "whitening.safetensors"
    assert entry.delete_damaged(path) == []
    flip(path, place)
    with pytest.raises(Damaged, match="whitening.safetensors' is damaged"):
        entry.read_whitening()
    assert entry.delete_damaged(path) == [path, entry.train.path(0), entry.train.path(4)]
    assert entry.whitening_notes == {}
    assert len(entry.train.missing()) == 2


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"cannot be written.*another dirpath"):
        FeatureStore.create(tmp_path / "file" / "store", MANIFEST)


def test_a_full_disk_is_known_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**12, 0, 3 * 10**9))
    check_space(tmp_path, 3 * 10**9)
    with pytest.raises(OSError, match=r"No space left.*4 GB are needed, 3 GB are free.*Free space there") as caught:
        check_space(tmp_path, 4 * 10**9)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)


def test_a_full_disk_loses_nothing_that_is_written(tmp_path, monkeypatch):
    store = FeatureStore.create(tmp_path, MANIFEST)
    complete_entry(store)
    entry = store.add("d2", {}, WEIGHTS)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        for write in (
            lambda: fill(entry),
            lambda: entry.write_sums({}, {"x": np.zeros(1)}),
            lambda: entry.write_whitening({"x": np.zeros(1)}, {}),
            lambda: entry.supplement({"run": "a"}),
            lambda: store.add("d3", {}, WEIGHTS),
        ):
            with pytest.raises(OSError, match=r"cannot be written in '.*No space left.*Free space there"):
                write()
    files = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert files == {
        "manifest.json",
        "meta.json",
        "weights.safetensors",
        *(f"{row:010d}.safetensors" for row in (0, 4)),
    }
    assert_holds_everything(store["d1"])
    assert fill(entry) == list(range(6))
    assert_holds_everything(entry)


def test_a_limit_of_the_system_is_an_error_and_not_a_crash(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written in '.*File too large.*Free space there"):
            store.add("d", {}, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.digests == []
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/abs", "a\0b", None])
def test_names_of_scores(tmp_path, name):
    with pytest.raises(ValueError, match="usable as a folder name"):
        FeatureStore.create(tmp_path, MANIFEST).scores_dir(name)


def test_a_store_that_was_removed_is_not_taken_over_by_another(tmp_path, monkeypatch):
    """Also where removing it was interrupted before anything was deleted."""
    complete_entry(FeatureStore.create(tmp_path, MANIFEST))
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    FeatureStore.remove(tmp_path)
    assert FeatureStore.create(tmp_path, {**MANIFEST, "n_train": 7}).digests == []


def test_other_files_stay_when_a_store_is_removed(tmp_path):
    complete_entry(FeatureStore.create(tmp_path, MANIFEST))
    (tmp_path / "notes.txt").write_text("")
    FeatureStore.remove(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"notes.txt", "manifest.lock"}
    FeatureStore.remove(tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_one_process_at_a_time_does_what_is_locked(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    entry = store.add("d", {}, WEIGHTS)
    script = """
        from lightning_trak.store.checkpoint import CheckpointEntry
        with CheckpointEntry(Path(sys.argv[1]), sys.argv[2], 6, 4).locked("work"):
            print("begun", flush=True)
            sys.stdin.readline()
            (Path(sys.argv[1]) / "ended").touch()
        """
    with start(script, entry.path, store.identity) as process:
        assert process.stdout.readline() == "begun\n"
        with entry.locked("other work"):
            process.stdin.write("\n")
            process.stdin.flush()
        with entry.locked("work"):
            assert (entry.path / "ended").exists()
        process.communicate()


def test_several_processes_make_a_store_and_share_its_work(tmp_path):
    """All of them add the same checkpoints and what they know of them, and fill them."""
    script = f"""
        from lightning_trak.store.store import FeatureStore
        import time, torch

        def work(number):
            store = FeatureStore.create(sys.argv[1], {MANIFEST!r} | {{"chunk_rows": 1}})
            for digest in "abcdefgh":
                entry = store.add(digest, {{"epoch": ord(digest)}}, {{"a": torch.ones(100)}})
                entry.supplement({{f"own {{number}}": number}})
                while entry.train.missing():
                    with Claim(entry.train) as claim:
                        for row in claim:
                            claim.write([row], {{"features": np.full((1, 2), row)}})
                    time.sleep(0.001)

        processes = []
        for number in range(3):  # forks, since torch takes long to import
            processes.append(os.fork())
            if not processes[-1]:
                work(number)
                os._exit(0)
        print([os.waitpid(process, 0)[1] for process in processes])
        """
    assert output_of(script, tmp_path) == "[0, 0, 0]\n"
    store = FeatureStore(tmp_path)
    assert store.digests == list("abcdefgh")
    for entry in store:
        assert entry.features.tolist() == [[row] * 2 for row in range(6)]
        assert entry.meta["epoch"] == ord(entry.digest)
        assert {f"own {number}" for number in range(3)} <= entry.meta.keys()
    assert not list(tmp_path.rglob("*.partial"))
