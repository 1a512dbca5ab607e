"""``clean``: deletes what is of no use, and nothing that a living process writes or that is not the store's."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_trak import FeatureStore
from lightning_trak.store.leftovers import leftovers
from lightning_trak.store.weights import weights_digest
from tests.commands.conftest import age, checkpoints, chunk, flip, tree
from tests.store.processes import held, start
from tests.store.test_store import MANIFEST, WEIGHTS

FILL = """
    import time
    from lightning_trak.store.checkpoint import CheckpointEntry
    train = CheckpointEntry(Path(sys.argv[1]), sys.argv[2], 200, 1).train
    print("begun", flush=True)
    while train.missing():
        with Claim(train) as claim:
            for row in claim:
                time.sleep(0.005)
                claim.write([row], {"features": np.full((1, 4), row)})
    """
TOKEN = "0123456789abcdef" * 2


def partial_of(path, content=b"half"):
    """Make what a killed process leaves of a file or folder that it was writing."""
    partial = path.with_name(f"{path.name}.{TOKEN}.partial")
    if content is None:
        partial.mkdir(parents=True)
        (partial / "meta.json").write_text("{}")
    else:
        partial.write_bytes(content)
    return partial


def leftovers_in(store):
    """Make one leftover of every kind, old enough to be deleted; return them."""
    entry = checkpoints(store)[0]
    made = [
        partial_of(store / "manifest.json"),
        partial_of(store / "checkpoints" / ("f" * 32), None),
        partial_of(entry / "meta.json"),
        partial_of(entry / "weights.safetensors"),
        partial_of(chunk(store)),
        partial_of(store / "scores" / "blobs" / "attribution.json"),
        store / ("removed-" + TOKEN),
        entry / "train" / "0000000064.lock",
        store / "scores" / "blobs" / "scores-0a0b0c0d.npy",
    ]
    (made[-3] / "checkpoints").mkdir(parents=True)
    made[-2].touch()
    np.save(made[-1], np.zeros(3))
    for path in made:
        age(path)
    return made


@pytest.fixture
def answers(monkeypatch):
    """Answer the next question; an answer of None is no terminal."""

    class Typed(io.StringIO):
        def isatty(self):
            return True

    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO() if text is None else Typed(text + "\n"))


def test_a_store_in_order(store, run):
    before = tree(store)
    assert run("clean", store, "--yes") == (0, "Nothing to delete.\n", "")
    assert tree(store) == before


def test_every_leftover_is_deleted_and_nothing_else(store, run):
    before = tree(store)
    made = leftovers_in(store)
    status, out, err = run("clean", store, "--yes")
    assert (status, err) == (0, "")
    assert f"Deleted: {len(made)} items" in out
    assert tree(store) == before


def test_a_table_of_a_save_that_was_killed_is_deleted_and_that_of_the_scores_stays(store, run):
    own = {path.name for path in (store / "scores" / "blobs").glob("*-*.json")}
    left = store / "scores" / "blobs" / "train-0a0b0c0d.json"
    left.write_text("{}")
    age(left)
    assert run("clean", store, "--yes")[0] == 0
    assert len(own) == 2
    assert {path.name for path in (store / "scores" / "blobs").glob("*-*.json")} == own


@pytest.mark.parametrize(("answer", "deletes"), [("y", True), ("yes", True), ("n", False), ("", False), ("ja", False)])
def test_it_asks(store, run, answers, answer, deletes):
    (partial,) = [path for path in leftovers_in(store) if path.name.startswith("manifest")]
    answers(answer)
    status, out, _ = run("clean", store)
    assert status == 0
    assert "manifest.json.0123456789ab....partial" in out
    assert "Delete 9 items, " in out
    assert partial.exists() != deletes
    assert ("Nothing was deleted." in out) != deletes


def test_without_a_terminal_nothing_is_deleted(store, run, answers):
    leftovers_in(store)
    before = tree(store)
    answers(None)
    status, out, err = run("clean", store)
    assert status == 1
    assert "to delete" in out
    assert err == "Nothing was deleted: there is no terminal to ask at. Pass --yes to delete.\n"
    assert tree(store) == before


def test_what_changed_within_the_last_hour_is_left_alone(store, run):
    made = leftovers_in(store)
    for path in made:
        age(path, 3000)
    status, out, _ = run("clean", store, "--yes")
    assert status == 0
    lock = made[-2]  # of a lock it is known whether it is held
    assert [path for path in made if not path.exists()] == [lock]
    assert out.count("it changed 50 minutes ago") == 6


def test_a_folder_is_as_young_as_the_youngest_file_in_it(store, run):
    partial = partial_of(store / "checkpoints" / ("f" * 32), None)
    age(partial)
    os.utime(partial / "meta.json")
    assert "it changed 0 minutes ago" in run("clean", store, "--yes")[1]
    assert (partial / "meta.json").exists()


@pytest.mark.parametrize(
    ("name", "lock"),
    [("train/0000000000.safetensors", "train/0000000000.lock"), ("whitening.safetensors", "whitening.lock")],
)
def test_what_is_written_under_a_lock_that_is_held_is_left_alone(store, run, name, lock):
    """However old it is. The lock itself is no leftover either."""
    entry = checkpoints(store)[0]
    partial = partial_of(entry / name)
    age(partial)
    with held(entry / lock):
        status, out, _ = run("clean", store, "--yes")
        assert status == 0
        assert "unfinished, but a process is working at it" in out
        assert partial.exists()
        assert (entry / lock).exists()
    assert "Deleted: " in run("clean", store, "--yes")[1]
    assert not partial.exists()


def test_files_of_the_user_stay(store, run):
    mine = [
        store / "removed-photos",
        store / "movie.partial",
        store / "mine" / f"x.{TOKEN}.partial",
        store / "scores" / "blobs" / "mine.npy",
        store / "scores" / "notes",
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if path.name == "removed-photos" else path.write_text("mine")
    age(store)
    assert run("clean", store, "--yes") == (0, "Nothing to delete.\n", "")
    assert all(path.exists() for path in mine)


def test_links_are_not_followed(store, run, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / f"x.{TOKEN}.partial").write_text("mine")
    (precious / "0000000000.lock").touch()
    (store / f"y.{TOKEN}.partial").symlink_to(precious, target_is_directory=True)
    (store / f"removed-{TOKEN}").symlink_to(precious, target_is_directory=True)
    (checkpoints(store)[0] / "linked").symlink_to(precious, target_is_directory=True)
    shutil.rmtree(store / "targets")
    (store / "targets").symlink_to(precious, target_is_directory=True)
    partial = partial_of(store / "checkpoints" / ("f" * 32), None)
    (partial / "linked").symlink_to(precious, target_is_directory=True)
    before = tree(precious)
    age(store)
    age(precious)
    out = run("clean", store, "--yes", "--targets")[1]
    assert "linked" not in out, "it has looked behind a link"
    assert tree(precious) == before
    assert not partial.exists()
    assert (store / f"y.{TOKEN}.partial").is_symlink()


def test_nothing_behind_a_link_is_deleted(store, run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (store / "checkpoints").rename(elsewhere)
    (store / "checkpoints").symlink_to(elsewhere, target_is_directory=True)
    flip(chunk(store))
    partial_of(chunk(store))
    age(elsewhere)
    before = tree(elsewhere)
    status, out, _ = run("clean", store, "--yes", "--checkpoint", checkpoints(store)[1].name)
    assert status == 0
    assert "it is behind a symbolic link" in out
    assert tree(elsewhere) == before


def test_damaged_files_that_can_be_computed_again_are_deleted(store, kind, run):
    again = [chunk(store, 0, 64), chunk(store, 1, 128)]
    if kind == "none":
        again.append(next(checkpoints(store)[0].glob("sums-*")))
    others = [checkpoints(store)[0] / "weights.safetensors", next((store / "scores" / "blobs").glob("scores-*"))]
    for path in again + others:
        flip(path)
    before = tree(store)
    status, out, _ = run("clean", store, "--yes")
    assert status == 0
    assert f"Deleted: {len(again)} items" in out
    gone = set(before) - set(tree(store))
    assert gone == {path.relative_to(store).as_posix() for path in again}
    if kind == "kronecker":
        flip(checkpoints(store)[1] / "whitening.safetensors")
        targets = list((store / "targets").glob(f"*/{checkpoints(store)[1].name}/*.safetensors"))
        count = 3 + len(targets)  # its two other chunks and the targets' are of no use without it
        assert f"Deleted: {count} items" in run("clean", store, "--yes")[1]
        assert not any(path.exists() for path in targets)
        assert not (checkpoints(store)[1] / "whitening.safetensors").exists()
        assert not chunk(store, 1).exists()


def test_damaged_files_that_a_process_mends_are_left_alone(store, run):
    flip(chunk(store))
    with held(chunk(store).with_suffix(".lock")):
        assert "damaged, but a process is working at it" in run("clean", store, "--yes")[1]
        assert chunk(store).exists()
    run("clean", store, "--yes")
    assert not chunk(store).exists()


def test_a_checkpoint_by_the_first_digits_of_its_name(store, run):
    first, second = checkpoints(store)
    status, out, _ = run("clean", store, "--yes", "--checkpoint", first.name[:12])
    assert status == 0
    assert f"checkpoint with its weights  checkpoints/{first.name[:12]}" in out
    assert checkpoints(store) == [second]
    assert FeatureStore(store).digests == [second.name]


def test_several_checkpoints_also_damaged_ones_with_what_is_in_them(store, run):
    first, second = checkpoints(store)
    flip(first / "meta.json")
    flip(chunk(store, 1))
    status, out, _ = run("clean", store, "--yes", "--checkpoint", first.name, "--checkpoint", second.name)
    assert status == 0
    assert all(f"  checkpoints/{path.name[:12]}..." in out for path in (first, second))
    assert "Deleted: 2 items" in out
    assert checkpoints(store) == []


@pytest.mark.parametrize("digits", ["", "g", "..", "../checkpoints", "meta.json"])
def test_a_checkpoint_that_is_not_there(store, run, digits):
    before = tree(store)
    status, _, err = run("clean", store, "--yes", "--checkpoint", digits)
    assert status == 2
    assert f"no checkpoint is named {digits!r}" in err
    assert tree(store) == before


def test_digits_of_more_than_one_checkpoint(store, run):
    for name in ("aa1", "aa2"):
        shutil.copytree(checkpoints(store)[0], store / "checkpoints" / name)
    status, _, err = run("clean", store, "--yes", "--checkpoint", "aa")
    assert status == 2
    assert "2 checkpoints begin with 'aa'" in err
    assert (store / "checkpoints" / "aa1").exists()


def test_a_checkpoint_at_which_a_process_works_stays(store, run):
    first = checkpoints(store)[0]
    with held(first / "train" / "0000000064.lock"):
        status, out, _ = run("clean", store, "--yes", "--checkpoint", first.name)
        assert status == 0
        assert "a process is working at it" in out
        assert first.exists()


def test_features_of_targets_go_if_asked_for_and_not_in_use(store, run):
    (folder,) = (store / "targets").iterdir()
    (store / "targets" / ("f" * 32)).mkdir()
    age(folder)
    assert run("clean", store, "--yes")[1] == "Nothing to delete.\n"
    with held(folder / checkpoints(store)[0].name / "0000000064.lock"):
        age(folder)
        out = run("clean", store, "--yes", "--targets")[1]
        assert "features of targets, but a process is working at it" in out
        assert "features of targets, but it changed 0 minutes ago" in out
    age(folder)
    run("clean", store, "--yes", "--targets")
    assert [path.name for path in (store / "targets").iterdir()] == ["f" * 32]


def test_what_cannot_be_deleted_is_told_and_the_rest_goes(store, run, monkeypatch):
    made = leftovers_in(store)
    whole = Path.unlink

    def refuse(path, **kwargs):
        if path == made[0]:
            raise PermissionError(13, "Permission denied", str(path))
        whole(path, **kwargs)

    monkeypatch.setattr(Path, "unlink", refuse)
    status, out, err = run("clean", store, "--yes")
    assert status == 1
    assert err.startswith(f"'{made[0].name}' could not be deleted: Permission denied")
    assert f"Deleted: {len(made) - 1} items" in out
    assert [path for path in made if path.exists()] == made[:1]


def test_processes_that_fill_the_store_meanwhile_lose_nothing(tmp_path, run):
    store = FeatureStore.create(tmp_path, {**MANIFEST, "n_train": 200, "chunk_rows": 1})
    entry = store.add(weights_digest(WEIGHTS), {}, WEIGHTS)
    rounds = 0
    with start(FILL, entry.path, store.identity) as one, start(FILL, entry.path, store.identity) as other:
        assert one.stdout.readline() == other.stdout.readline() == "begun\n"
        while one.poll() is None or other.poll() is None:
            for leftover in leftovers(store):  # as clean does, and more often
                leftover.delete()
            rounds += 1
    assert (one.returncode, other.returncode) == (0, 0)
    assert rounds > 10
    assert run("verify", tmp_path)[0] == 0
    assert entry.train.column("features")[:, 0].tolist() == list(range(200))
