"""What can be deleted: looked at again before it goes."""

from __future__ import annotations

import os
import time

import pytest

from lightning_trak import FeatureStore
from lightning_trak.store.files import Damaged
from lightning_trak.store.inspection import Problem, checkpoints_of, inspect_checkpoint
from lightning_trak.store.leftovers import Leftover, leftovers
from lightning_trak.store.locks import is_held, taken
from lightning_trak.store.weights import weights_digest
from tests.store.processes import held, output_of
from tests.store.test_store import FEATURES, MANIFEST, WEIGHTS, fill, flip

LOOK = """
    from lightning_trak.store.locks import is_held
    print(is_held(Path(sys.argv[1])))
    """
DIGEST = weights_digest(WEIGHTS)


@pytest.fixture
def store(tmp_path):
    store = FeatureStore.create(tmp_path, MANIFEST)
    fill(store.add(DIGEST, {"epoch": 1}, WEIGHTS))
    return store


def damaged_chunk(store):
    """A chunk that was damaged when the store was looked at."""
    path = store[DIGEST].train.path(0)
    flip(path)
    (problem,) = inspect_checkpoint(store, DIGEST, checkpoints_of(store)[DIGEST]).problems
    assert problem.path == path
    return Leftover(store.dirpath, path, "damaged", 1, problem)


def test_a_file_that_another_process_has_mended_meanwhile_stays(store):
    leftover = damaged_chunk(store)
    store[DIGEST].train.write(0, {name: array[:4] for name, array in FEATURES.items()})
    assert not leftover.delete()
    assert store[DIGEST].complete
    flip(leftover.path)
    assert leftover.delete()
    assert store[DIGEST].train.missing() == [range(4)]
    assert [path.name for path in leftover.path.parent.iterdir()] == ["0000000004.safetensors"], "a lock is left"


def test_a_file_that_is_gone_is_deleted(store):
    leftover = damaged_chunk(store)
    leftover.path.unlink()
    assert leftover.delete()


def test_a_leftover_that_was_touched_after_it_was_listed_stays(store):
    path = store.dirpath / f"manifest.json.{'a' * 32}.partial"
    path.write_text("half")
    then = time.time() - 4000
    os.utime(path, (then, then))
    (leftover,) = leftovers(store)
    assert leftover.kept() == ""
    os.utime(path)
    assert not leftover.delete()
    assert path.exists()
    os.utime(path, (then, then))
    assert leftover.delete()
    assert not path.exists()


def test_a_link_in_place_of_a_folder_is_not_followed(store, tmp_path_factory):
    """Put there after the leftover was listed."""
    other = tmp_path_factory.mktemp("precious")
    path = store.dirpath / f"removed-{'a' * 32}"
    path.mkdir()
    then = time.time() - 4000
    os.utime(path, (then, then))
    (leftover,) = leftovers(store)
    path.rmdir()
    path.symlink_to(other, target_is_directory=True)
    assert not leftover.delete()
    assert path.is_symlink()
    assert other.is_dir()


def test_a_problem_that_cannot_be_computed_again_is_not_offered(store):
    flip(store[DIGEST].weights_path)
    (problem,) = inspect_checkpoint(store, DIGEST, checkpoints_of(store)[DIGEST]).problems
    assert isinstance(problem, Problem)
    assert problem.check is None


def test_a_checkpoint_that_was_deleted_meanwhile_is_no_problem(store):
    entry = checkpoints_of(store)[DIGEST]
    store.discard(DIGEST)
    assert inspect_checkpoint(store, DIGEST, entry).problems == []


def test_checkpoints_come_in_the_order_in_which_they_were_added(store):
    for name in ("b", "a"):
        store.add(name, {}, WEIGHTS)
    (store.dirpath / "checkpoints" / "0").mkdir()
    found = checkpoints_of(store)
    assert list(found) == [DIGEST, "b", "a", "0"]
    assert isinstance(found["0"], Damaged)


def test_a_lock_is_looked_at_without_a_trace(tmp_path):
    path = tmp_path / "x.lock"
    assert is_held(path) is False
    with taken(path) as free:
        assert free
        assert output_of(LOOK, path) == "True\n"
    assert list(tmp_path.iterdir()) == []
    path.touch()
    assert is_held(path) is False
    assert list(tmp_path.iterdir()) == [path], "the lock was there before"
    with taken(path, delete=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "x.lock"
    with held(path):
        assert is_held(path) is True
        with taken(path) as free:
            assert not free
    assert is_held(path) is False
