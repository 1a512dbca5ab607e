"""``verify``: no damage is missed, and none hides another."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from tests.commands.conftest import KINDS, N, checkpoints, chunk, data, empty, flip, trainer_of, tree, truncate
from tests.conftest import Classifier

FILES = {  # by kind: what verify calls a file, whether it can be computed again, and whether it may be missing
    "manifest.json": ("*", "manifest.json", False, False),
    "meta": ("*", "checkpoints/*/meta.json", False, False),
    "weights": ("*", "checkpoints/*/weights.safetensors", False, False),
    "first chunk": ("*", "checkpoints/*/train/0000000000.safetensors", True, True),
    "last chunk": ("*", "checkpoints/*/train/0000000128.safetensors", True, True),
    "curvature": ("kronecker", "checkpoints/*/whitening.safetensors", True, False),
    "sums": ("none", "checkpoints/*/sums-*.safetensors", True, True),
    "index": ("*", "scores/blobs/attribution.json", False, False),
    "scores": ("*", "scores/blobs/scores-*.npy", False, False),
    "outputs": ("*", "scores/blobs/outputs-*.npy", False, False),
}
DAMAGES = {"flip": flip, "truncate": truncate, "empty": empty, "delete": os.remove}


def test_whole_stores(store, run):
    before = tree(store)
    status, out, err = run("verify", store)
    assert (status, err) == (0, "")
    for path in checkpoints(store):
        (line,) = [line for line in out.splitlines() if line.startswith(path.name[:12])]
        assert line.endswith(f"{N} of {N}  ok")
    assert "Nothing is damaged" in out
    assert "missing" not in out
    assert "Damaged" not in out
    assert tree(store) == before, "verify has changed something"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name, file in FILES.items() if file[0] in ("*", kind)]
)
def test_every_damage_to_every_file(store, kind, run, name, damage):
    _, pattern, again, may_be_missing = FILES[name]
    path = sorted(store.glob(pattern))[0]
    DAMAGES[damage](path)
    if (name, damage) == ("manifest.json", "delete"):
        status, out, err = run("verify", store)
        assert (status, out) == (2, "")
        assert "no manifest.json" in err
        return
    status, out, _ = run("verify", store)
    if damage == "delete" and may_be_missing:
        assert status == 0
        assert "Nothing is damaged" in out
        assert ("missing" in out) == ("chunk" in name)
        return
    assert status == 1
    shown = path.parent if path.is_relative_to(store / "scores") else path
    assert str(shown.relative_to(store)) in out
    assert ("can be computed again" in out) == again
    assert ("--checkpoint DIGEST" in out) == (name in ("meta", "weights"))


def test_the_rows_that_are_whole_are_counted(store, run):
    flip(chunk(store, 0, 128))
    chunk(store, 1, 64).unlink()
    lines = run("verify", store)[1].splitlines()
    first, second = (path.name[:12] for path in checkpoints(store))
    assert any(line.startswith(first) and "128 of 150  damaged" in line for line in lines)
    assert any(line.startswith(second) and "86 of 150  64 rows missing" in line for line in lines)
    assert any("Rows are missing at 1 checkpoint:" in line for line in lines)


def test_files_that_changed_places_are_both_damaged(store, run):
    one, other = chunk(store, 0), chunk(store, 1)
    one.rename(store / "x")
    other.rename(one)
    (store / "x").rename(other)
    status, out, _ = run("verify", store)
    assert status == 1
    assert out.count("It belongs elsewhere.") == 2


@pytest.mark.parametrize("kind", ["none"])
def test_sums_of_another_checkpoint_are_damaged(store, run):
    one, other = (next(path.glob("sums-*")) for path in checkpoints(store))
    shutil.copy(one, other.with_name(one.name))
    status, out, _ = run("verify", store)
    assert (status, out.count("It belongs elsewhere.")) == (1, 1)


def test_damage_does_not_hide_other_damage(store, run):
    flip(checkpoints(store)[0] / "meta.json")
    flip(chunk(store, 1))
    flip(next((store / "scores").glob("*/scores-*")))
    status, out, _ = run("verify", store)
    assert status == 1
    assert out.count("\nDamaged: ") == 3


def test_chunks_of_one_folder_with_one_fault_are_one_paragraph(store, run):
    for start in (0, 64, 128):
        flip(chunk(store, 0, start))
    out = run("verify", store)[1]
    assert out.count("\nDamaged: ") == 1
    assert "0000000000.safetensors and 2 files more in its folder" in out


@pytest.mark.parametrize("kind", ["kronecker"])
def test_a_curvature_that_is_gone_takes_its_features_with_it(store, run):
    (checkpoints(store)[0] / "whitening.safetensors").unlink()
    status, out, _ = run("verify", store)
    assert status == 1
    assert "It belongs to whitening.safetensors, which is damaged or missing." in out
    assert "0 of 150  damaged" in out


def test_features_of_targets(store, run):
    files = sorted(store.glob("targets/*/*/*.safetensors"))
    (digests,) = store.glob("targets/*/examples.safetensors")
    whole = f"{len(files) + 1} of {len(files) + 1} files ok"
    assert whole in run("verify", store)[1]
    flip(digests)
    status, out, _ = run("verify", store)
    assert status == 1
    assert f"{digests.name}" in out
    assert run("clean", store, "--yes")[0] == 0
    assert not digests.exists()
    assert f"{len(files)} of {len(files)} files ok" in run("verify", store)[1]
    flip(files[0])
    status, out, _ = run("verify", store)
    assert status == 1
    assert f"{len(files) - 1} of {len(files)} files ok" in out
    assert f"Damaged: {files[0].relative_to(store)}" in out


def test_exchanged_features_of_targets(store, run):
    """Of other rows, and of another checkpoint."""
    next(iter(store.glob("targets/*/examples.safetensors"))).unlink()
    files = sorted(store.glob("targets/*/*/*.safetensors"))
    for other in (files[1], files[-1]):
        one, two = files[0].read_bytes(), other.read_bytes()
        files[0].write_bytes(two)
        other.write_bytes(one)
        status, out, _ = run("verify", store)
        assert status == 1
        assert f"{len(files) - 2} of {len(files)} files ok" in out
        assert "It belongs elsewhere" in out
        files[0].write_bytes(one)
        other.write_bytes(two)


@pytest.mark.parametrize(
    "name", ["notes.txt", "checkpoints/notes.txt", "checkpoints/{digest}/notes", "checkpoints/{digest}/train/copy.bin"]
)
def test_what_is_not_of_the_store_is_named_and_no_damage(store, run, name):
    name = name.format(digest=checkpoints(store)[0].name)
    (store / name).write_text("mine")
    status, out, _ = run("verify", store)
    assert status == 0
    assert f"of no harm:\n  {name}\n" in out


def test_a_folder_that_cannot_be_a_checkpoint_is_damaged(store, run):
    (store / "checkpoints" / "mine").mkdir()
    status, out, _ = run("verify", store)
    assert status == 1
    assert "Damaged: checkpoints/mine/meta.json" in out


def test_a_file_that_cannot_be_read(store, run):
    chunk(store).unlink()
    chunk(store).mkdir()
    status, out, _ = run("verify", store)
    assert status == 1
    assert "It is a folder." in out


def test_what_is_mended_as_verify_says_is_whole(store, kind, run):
    """Damaged files are deleted by ``clean``, and computed again by ``attribute``."""
    other = re.compile(r".*(-[0-9a-f]{8}\.(npy|json)|\.lock)")  # each time scores are saved, they get new names
    before = {path for path in tree(store) if not other.fullmatch(path)}
    flip(chunk(store, 0, 64))
    flip(next(store.glob("checkpoints/*/whitening.safetensors" if kind == "kronecker" else "checkpoints/*/sums-*")))
    assert run("verify", store)[0] == 1
    assert run("clean", store, "--yes")[0] == 0
    status, out, _ = run("verify", store)
    assert status == 0
    assert "Rows are missing" in out
    trainer_of(store.parent, kind).attribute(Classifier(), datamodule=data(), name="blobs")
    status, out, _ = run("verify", store)
    assert status == 0
    assert "missing" not in out
    assert before <= set(tree(store))
