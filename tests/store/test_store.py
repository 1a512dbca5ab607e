"""FeatureStore: nothing lost, nothing mixed, damage noticed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trak import FeatureStore

MANIFEST = {
    "n_train": 6,
    "parameters": {"net.weight": [2, 3]},
    "projection": {"projector": "sparse", "proj_dim": 4, "seed": 0},
    "data": "abc",
}
RNG = np.random.default_rng(0)
FEATURES, GRAD, CURVATURE = RNG.normal(size=(6, 4)), RNG.normal(size=6), RNG.uniform(size=6)


def write(entry, rows):
    entry.write(rows, FEATURES[rows], GRAD[rows], CURVATURE[rows])


def complete_entry(store, digest="d1"):
    entry = store.add(digest, {"epoch": 1})
    entry.allocate(4)
    write(entry, entry.missing_rows().tolist())
    entry.finish()
    return entry


def assert_holds_everything(entry):
    np.testing.assert_array_equal(entry.features, FEATURES.astype(np.float32))
    np.testing.assert_array_equal(entry.loss_grad, GRAD.astype(np.float32))
    np.testing.assert_array_equal(entry.curvature, CURVATURE.astype(np.float32))


def test_layout_on_disk(tmp_path):
    store = FeatureStore.create(tmp_path / "s", MANIFEST)
    entry = complete_entry(store)
    assert json.loads((tmp_path / "s" / "manifest.json").read_text()) == {"format_version": 1, **MANIFEST}
    names = {path.name for path in (tmp_path / "s" / "checkpoints" / "d1").iterdir()}
    assert names == {"features.npy", "loss_grad.npy", "curvature.npy", "written.npy", "meta.json"}
    assert entry.weights_path == tmp_path / "s" / "checkpoints" / "d1" / "weights.pt"
    assert np.load(entry.path / "features.npy", allow_pickle=False).shape == (6, 4)
    assert store.scores_dir("x") == tmp_path / "s" / "scores" / "x"


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.lists(st.integers(0, 6), max_size=3))
def test_rows_may_come_in_any_order_and_batches(tmp_path_factory, order, cuts):
    store = FeatureStore.create(tmp_path_factory.mktemp("store"), MANIFEST)
    entry = store.add("d", {})
    entry.allocate(4)
    edges = [0, *sorted(cuts), 6]
    for start, stop in itertools.pairwise(edges):
        write(entry, list(order[start:stop]))
        assert entry.missing_rows().tolist() == sorted(order[stop:])
    entry.finish()
    assert_holds_everything(FeatureStore(store.dirpath)["d"])


def test_a_row_is_written_once_and_used_only_with_all_others(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    entry = store.add("d", {})
    entry.allocate(4)
    write(entry, [0, 1])
    with pytest.raises(ValueError, match=r"Rows \[1\] .* are written already"):
        write(entry, [1, 2])
    with pytest.raises(ValueError, match="4 rows of checkpoint d are not written"):
        entry.finish()
    with pytest.raises(ValueError, match="features of 2 of 6"):
        entry.features  # noqa: B018
    assert not entry.complete


def test_resume_in_another_object(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    entry = store.add("d", {})
    assert entry.missing_rows().tolist() == list(range(6))
    entry.allocate(4)
    write(entry, [4, 0])
    again = FeatureStore.create(tmp_path, MANIFEST)["d"]
    again.allocate(4)  # keeps what is there
    assert again.missing_rows().tolist() == [1, 2, 3, 5]
    write(again, [1, 2, 3, 5])
    again.finish()
    assert_holds_everything(FeatureStore(tmp_path)["d"])


def test_a_killed_process_loses_only_the_batch_in_flight(tmp_path):
    script = f"""
    import os, signal, numpy as np
    from lightning_trak import FeatureStore
    entry = FeatureStore.create({str(tmp_path)!r}, {MANIFEST!r}).add("d", {{}})
    entry.allocate(4)
    for row in (0, 1, 2):
        entry.write([row], np.full((1, 4), row), np.full(1, row), np.full(1, row))
    os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert result.returncode == -signal.SIGKILL
    entry = FeatureStore(tmp_path)["d"]
    assert entry.missing_rows().tolist() == [3, 4, 5]
    entry.write([3, 4, 5], np.zeros((3, 4)), np.zeros(3), np.zeros(3))
    entry.finish()
    np.testing.assert_array_equal(entry.features[:3], np.arange(3)[:, None] * np.ones(4))


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


def test_checkpoints_are_one_each_in_the_order_of_arrival(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    for digest in ("zz", "aa", "mm", "aa"):
        store.add(digest, {"epoch": 0})
    assert store.digests == ["zz", "aa", "mm"]
    assert len(store) == 3
    assert "aa" in store
    store.discard("aa")
    assert store.digests == ["zz", "mm"]
    with pytest.raises(KeyError, match="has no checkpoint aa"):
        store["aa"]
    assert repr(store).startswith(f"FeatureStore('{tmp_path}', n_train=6, checkpoints=2, featurized=0")


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no feature store.*TRAKCallback"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "pickled", "gone", "short"])
@pytest.mark.parametrize("name", ["features", "loss_grad", "curvature"])
def test_damaged_arrays_are_noticed(tmp_path, name, damage):
    store = FeatureStore.create(tmp_path, MANIFEST)
    path = complete_entry(store).path / f"{name}.npy"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-5])
    elif damage == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "pickled":
        np.save(path, np.array([{}] * 6, dtype=object), allow_pickle=True)
    elif damage == "short":
        np.save(path, np.zeros(5))
    else:
        path.unlink()
    entry = FeatureStore(tmp_path)["d1"]
    with pytest.raises(ValueError, match=rf"{name}.npy' is damaged.*featurize the checkpoint again"):
        entry.verified(name).read()
    if damage != "flipped":
        with pytest.raises(ValueError, match=rf"{name}.npy' is damaged"):
            getattr(entry, name)


def test_rows_are_verified_as_they_are_read(tmp_path):
    entry = complete_entry(FeatureStore.create(tmp_path, MANIFEST))
    for size in (1, 4, 6, 100):
        np.testing.assert_array_equal(np.concatenate(list(entry.verified("features").blocks(size))), entry.features)


def test_sums_are_those_of_their_key_and_features(tmp_path):
    entry = complete_entry(FeatureStore.create(tmp_path, MANIFEST))
    sums = {"matrix": np.eye(4), "squares": np.array(2.0)}
    assert entry.read_sums({"curvature": True}) is None
    entry.write_sums({"curvature": True}, sums)
    found = entry.read_sums({"curvature": True})
    np.testing.assert_array_equal(found["matrix"], sums["matrix"])
    assert set(found) == set(sums)
    assert entry.read_sums({"curvature": False}) is None
    (path,) = entry.path.glob("sums-*.npz")
    content = path.read_bytes()
    for damaged in (content[:-20], content[:200] + bytes([content[200] ^ 1]) + content[201:], b""):
        path.write_bytes(damaged)
        assert entry.read_sums({"curvature": True}) is None
    path.write_bytes(content)
    entry.meta["checksums"]["features"] += 1  # other features
    assert entry.read_sums({"curvature": True}) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1'])
def test_damaged_metadata_is_noticed(tmp_path, content):
    store = FeatureStore.create(tmp_path, MANIFEST)
    entry = complete_entry(store)
    (entry.path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta.json' is damaged.*Delete"):
        store["d1"]
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json' is damaged.*Delete"):
        FeatureStore(tmp_path)


def test_other_format_version(tmp_path):
    FeatureStore.create(tmp_path, MANIFEST)
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version=99.*another dirpath"):
        FeatureStore(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"cannot be written.*another dirpath"):
        FeatureStore.create(tmp_path / "file" / "store", MANIFEST)


def test_full_disk_is_known_before_the_work(tmp_path, monkeypatch):
    store = FeatureStore.create(tmp_path, MANIFEST)
    complete_entry(store)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    entry = store.add("d2", {})
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(OSError, match="No space left.*Free space"):
            entry.allocate(4)
    assert sorted(path.name for path in entry.path.iterdir()) == ["meta.json"]
    assert_holds_everything(store["d1"])
    entry.allocate(4)
    write(entry, list(range(6)))
    entry.finish()


def test_a_limit_of_the_system_is_an_error_and_not_a_crash(tmp_path):
    script = f"""
    import resource, signal
    from lightning_trak import FeatureStore
    entry = FeatureStore.create({str(tmp_path)!r}, {MANIFEST!r}).add("d", {{}})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        entry.allocate(100_000)
    except OSError as error:
        print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "cannot be written" in result.stdout
    assert "Free space" in result.stdout


def test_without_posix_fallocate(tmp_path, monkeypatch):
    """Some systems lack it, and some file systems, as of networks, answer that they do not support it."""

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", unsupported)
    assert_holds_everything(complete_entry(FeatureStore.create(tmp_path / "one", MANIFEST)))
    monkeypatch.delattr("os.posix_fallocate")
    assert_holds_everything(complete_entry(FeatureStore.create(tmp_path / "other", MANIFEST)))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/abs"])
def test_names_of_scores(tmp_path, name):
    with pytest.raises(ValueError, match="usable as a folder name"):
        FeatureStore.create(tmp_path, MANIFEST).scores_dir(name)


def test_a_store_that_was_removed_is_not_taken_over_by_another(tmp_path, monkeypatch):
    """Also where removing it was interrupted before anything was deleted."""
    complete_entry(FeatureStore.create(tmp_path, MANIFEST))
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    FeatureStore.remove(tmp_path)
    assert FeatureStore.create(tmp_path, {**MANIFEST, "n_train": 7}).digests == []


@pytest.mark.parametrize("place", range(0, 600, 7))
def test_damaged_sums_are_none(tmp_path, place):
    entry = complete_entry(FeatureStore.create(tmp_path, MANIFEST))
    entry.write_sums({}, {"upper": np.eye(4), "numbers": np.arange(3.0)})
    (path,) = entry.path.glob("sums-*.npz")
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 255
    path.write_bytes(content)
    found = entry.read_sums({})
    if found is not None:  # what was damaged was not read
        np.testing.assert_array_equal(found["upper"], np.eye(4))
