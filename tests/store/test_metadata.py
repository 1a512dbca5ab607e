"""The JSON files of a store: whatever they hold, the store works or says which file is damaged."""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trak import FeatureStore
from lightning_trak.influence import TrainingTime
from lightning_trak.store.files import Damaged, checksum_of

MANIFEST = {
    "n_train": 6,
    "parameters": {"net.weight": [2, 3]},
    "preconditioner": None,
    "projection": {"projector": "sparse", "proj_dim": 4, "seed": 0},
    "data": "abc",
    "data_rows": "0123" * 6,
    "chunk_rows": 4,
}
META = {
    "run": "a",
    "epoch": 1,
    "global_step": 10,
    "file": "x.ckpt",
    "training_time": asdict(TrainingTime(0.5, 10)),
    "n_trainable": 6,
    "logistic": True,
    "loss_explained": 0.9,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def made(folder):
    store = FeatureStore.create(folder, MANIFEST)
    store.add("d", META, {"net.weight": torch.ones(2, 3)})
    return store


def signed(path, value):
    """Write a JSON object with the checksum of its content."""
    value = {name: item for name, item in value.items() if name != "checksum"}
    path.write_text(json.dumps({"checksum": checksum_of(value), **value}))


def unsigned(path):
    return {name: item for name, item in json.loads(path.read_text()).items() if name != "checksum"}


def read(store):
    """Read all that there is to read, as the library does."""
    assert repr(store).startswith("FeatureStore(")
    assert store.digests == [entry.digest for entry in store] == ["d"]
    assert len(store) == 1
    store.check(MANIFEST)
    meta = store["d"].meta
    assert not store["d"].complete
    assert {meta.get("run")} <= {meta.get("run"), None}
    assert "" in (meta.get("file") or "")
    assert (meta.get("epoch") or 0) + (meta.get("global_step") or 0) + (meta.get("n_trainable") or 0) is not None
    assert meta.get("logistic", False) in (True, False, None)
    training = meta.get("training_time")
    if training is not None:
        training = TrainingTime(**training)
        assert isinstance(training.time + training.steps + training.weight_decay, float | int)


def assert_works_or_explains(folder):
    """The store is read, or the error is one of ours and says where: nothing else may come out."""
    for use in (
        lambda: read(FeatureStore(folder)),
        lambda: FeatureStore(folder)["no checkpoint"],
        lambda: FeatureStore.create(folder, MANIFEST),
        lambda: FeatureStore.create(folder, {**MANIFEST, "n_train": 7, "data": "other", "data_rows": "4567" * 7}),
    ):
        try:
            use()
        except (ValueError, FileNotFoundError, KeyError) as error:
            said = str(error)
        else:
            said = str(folder)
        assert str(folder) in said


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made(tmp_path_factory.mktemp("metadata"))


@pytest.fixture
def restored(store):
    """The two files of a store, which are as they were after each test."""
    paths = [store.dirpath / "manifest.json", store["d"].path / "meta.json"]
    contents = [path.read_bytes() for path in paths]
    yield paths
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)


def test_metadata_that_is_right_is_read(store, restored):
    read(store)
    assert {name: store["d"].meta[name] for name in META} == META
    for path in restored:
        signed(path, unsigned(path))
    read(FeatureStore(store.dirpath))
    signed(restored[1], {**unsigned(restored[1]), "more": [1, {"a": None}]})
    read(FeatureStore(store.dirpath))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 2', '{"n_train": 6}', "\xff", "[" * 100_000])
def test_damaged_metadata_is_noticed(store, restored, content):
    manifest, meta = restored
    meta.write_bytes(content.encode("latin-1"))
    for use in (lambda: store["d"], lambda: list(store), lambda: store.digests, lambda: repr(store)):
        with pytest.raises(Damaged, match=r"meta.json' is damaged.*Delete the folder"):
            use()
    manifest.write_bytes(content.encode("latin-1"))
    for use in (lambda: FeatureStore(store.dirpath), lambda: FeatureStore.create(store.dirpath, MANIFEST)):
        with pytest.raises(Damaged, match=r"manifest.json' is damaged.*another dirpath.*overwrite=True"):
            use()


def test_every_byte_of_the_metadata_counts_or_is_of_no_import(store, restored):
    before = store.manifest, store["d"].meta
    for path in restored:
        content = path.read_bytes()
        for place, byte in enumerate(content):
            path.write_bytes(content[:place] + bytes([byte ^ 1 << place % 8]) + content[place + 1 :])
            with suppress(ValueError):
                found = FeatureStore(store.dirpath)
                assert (found.manifest, found["d"].meta) == before
            path.write_bytes(content[:place])
            with pytest.raises(Damaged):
                FeatureStore(store.dirpath)["d"]
        path.write_bytes(content)


def test_metadata_that_was_edited_is_damaged(store, restored):
    for path, old in zip(restored, ('"seed": 0', '"epoch": 1'), strict=True):
        text = path.read_text()
        path.write_text(text.replace(old, f"{old[:-1]}7"))
        assert path.read_text() != text
        with pytest.raises(Damaged, match=f"{path.name}' is damaged: its checksum has changed"):
            FeatureStore(store.dirpath)["d"]
        path.write_text(json.dumps(json.loads(text)))  # the same content in another form
        read(FeatureStore(store.dirpath))


@pytest.mark.parametrize("version", [1, 3, 99, 10**30])
def test_another_format_version(store, restored, version):
    """Also where there is no checksum yet, or another one."""
    restored[0].write_text(json.dumps({"format_version": version}))
    for use in (lambda: FeatureStore(store.dirpath), lambda: FeatureStore.create(store.dirpath, MANIFEST)):
        with pytest.raises(ValueError, match=f"format_version={version}.*another dirpath"):
            use()


@pytest.mark.parametrize("field", ["format_version", "n_train", "chunk_rows", "parameters", "projection"])
@pytest.mark.parametrize("value", [None, "2", 2.0, True, [], 0, -1])
def test_a_manifest_lacks_nothing(store, restored, field, value):
    manifest, _ = restored
    content = unsigned(manifest)
    if value is None:
        del content[field]
    else:
        content[field] = value
    signed(manifest, content)
    with pytest.raises(ValueError, match=f"manifest.json' is damaged: its {field} is |format_version=(0|-1);"):
        FeatureStore(store.dirpath)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, {"a": 1}) for field in (*META, "created") if field != "training_time"],
        *[(field, [1]) for field in (*META, "created")],
        ("epoch", True),
        ("logistic", 1),
        ("created", None),
    ],
)
def test_values_of_another_type_are_damaged(store, restored, field, value):
    signed(restored[1], {**unsigned(restored[1]), field: value})
    with pytest.raises(Damaged, match=f"meta.json' is damaged: no such values can be of {field}"):
        store["d"]


@pytest.mark.parametrize(("field", "value"), [("time", "1"), ("steps", 1.5), ("weight_decay", None), ("other", 1)])
def test_a_training_time_that_is_none_is_damaged(store, restored, field, value):
    signed(restored[1], {**unsigned(restored[1]), "training_time": {**META["training_time"], field: value}})
    with pytest.raises(Damaged, match=f"meta.json' is damaged: no such values can be of {field}"):
        store["d"]


def test_a_training_time_has_the_fields_that_are_known_here(store, restored):
    _, meta = restored
    for training in ({field.name: 1 for field in fields(TrainingTime)}, {}, None, {"time": 1}):
        signed(meta, {**unsigned(meta), "training_time": training})
        assert store["d"].meta["training_time"] == training


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_train", 2**70),
        ("chunk_rows", 10**400),
        ("data_rows", 1),
        ("data_rows", None),
        ("data_rows", "0123"),
        ("preconditioner", [1]),
        ("preconditioner", "kronecker"),
    ],
)
def test_values_that_no_manifest_has_are_damaged(store, restored, field, value):
    signed(restored[0], {**unsigned(restored[0]), field: value})
    with pytest.raises(Damaged, match=f"manifest.json' is damaged: its {field} (is|are) "):
        FeatureStore(store.dirpath)


@pytest.mark.parametrize("depth", [50, 300, *range(800, 1000, 8), 2000, 20_000])
def test_deeply_nested_metadata(store, restored, depth):
    nested = "[" * depth + "]" * depth
    for path in restored:
        content = unsigned(path)
        for name in ("more", "format_version", "projection", "training_time"):
            text = json.dumps({**content, name: "?"}, sort_keys=True).replace('"?"', nested)
            path.write_text(f'{{"checksum": {zlib.crc32(text.encode())}, {text[1:]}')  # without recursion
            assert_works_or_explains(store.dirpath)
        signed(path, content)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*META, "created", "digest", "store", "more"]), JSON), st.booleans(), st.data())
def test_any_meta_with_a_right_checksum(store, changes, partly, data):
    path = store.dirpath / "checkpoints" / "d" / "meta.json"
    before = path.read_bytes()
    content = {**unsigned(path), **changes} if partly else data.draw(st.dictionaries(st.text(), JSON))
    try:
        signed(path, content)
        assert_works_or_explains(store.dirpath)
    finally:
        path.write_bytes(before)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*MANIFEST, "format_version", "more"]), JSON),
    st.lists(st.sampled_from([*MANIFEST, "format_version"]), max_size=2),
    st.booleans(),
    st.data(),
)
def test_any_manifest_with_a_right_checksum(store, changes, dropped, partly, data):
    manifest, meta = store.dirpath / "manifest.json", store.dirpath / "checkpoints" / "d" / "meta.json"
    before = manifest.read_bytes(), meta.read_bytes()
    content = {**unsigned(manifest), **changes} if partly else data.draw(st.dictionaries(st.text(), JSON))
    content = {name: value for name, value in content.items() if name not in dropped}
    try:
        signed(manifest, content)
        assert_works_or_explains(store.dirpath)
        try:
            identity = FeatureStore(store.dirpath).identity
        except ValueError:
            return
        signed(meta, {**unsigned(meta), "store": identity})  # a checkpoint that fits
        assert_works_or_explains(store.dirpath)
    finally:
        manifest.write_bytes(before[0])
        meta.write_bytes(before[1])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode("utf-8")), st.sampled_from([0, 1]))
def test_any_bytes(store, content, which):
    path = [store.dirpath / "manifest.json", store.dirpath / "checkpoints" / "d" / "meta.json"][which]
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        assert_works_or_explains(store.dirpath)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("digest", ["", ".", "..", "a/b", "no\0name"])
def test_names_that_are_no_digests(store, digest):
    with pytest.raises((KeyError, Damaged), match=str(store.dirpath)):
        store[digest]
