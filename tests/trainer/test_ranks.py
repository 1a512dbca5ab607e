"""Several processes: rows, features and scores are those of one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_trak import Attribution, FeatureStore
from tests.trainer.ranks import M, N


def run(folder, strategy, world, *files):
    folder.mkdir()
    variables = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "tests.trainer.ranks", folder, strategy, str(world), *files]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process trains; returns its checkpoint files, its store, and what it finds."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    found = run(folder, "auto", 1)
    return sorted((folder / "files").iterdir()), FeatureStore(folder / "store"), found


@pytest.mark.parametrize("case", ["ddp 2", "ddp 3", "ddp_spawn 2", "ddp_notebook 2"])
def test_files_are_attributed_as_by_one_process(tmp_path, alone, case):
    files, store, found = alone
    scores, own = run(tmp_path / "run", *case.split(), *map(str, files))
    assert scores.shape == (N, M)
    torch.testing.assert_close(scores, found[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(own, found[1], rtol=1e-3, atol=1e-5)
    shared = FeatureStore(tmp_path / "run" / "store")
    assert sorted(shared.digests) == sorted(store.digests)
    for entry in shared:
        (one,), (other,) = (each.train.blocks(None, N) for each in (entry, store[entry.digest]))
        for name in ("loss_grad", "curvature", "outputs"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5)
    assert torch.equal(Attribution.load(shared.scores_dir("kept")).scores, scores)
    (targets,) = (shared.dirpath / "targets").iterdir()
    for entry in shared:
        assert entry.targets(targets.name, M, 1).complete


@pytest.mark.parametrize("case", ["ddp 2", "ddp_notebook 2"])
def test_training_in_two_processes_leaves_a_complete_store(tmp_path, case):
    """Also with a sampler of the user's, which pads, and with files that hold weights alone."""
    scores, own = run(tmp_path / "run", *case.split())
    store = FeatureStore(tmp_path / "run" / "store")
    assert len(store) == 2
    assert all(entry.complete for entry in store)
    assert len({entry.meta["run"] for entry in store}) == 1
    assert scores.shape == (N, M)
    again = run(tmp_path / "again", "auto", 1, *map(str, sorted((tmp_path / "run" / "files").iterdir())))
    reference = FeatureStore(tmp_path / "again" / "store")
    assert sorted(store.digests) == sorted(reference.digests)
    for entry in store:
        np.testing.assert_allclose(entry.loss_grad, reference[entry.digest].loss_grad, rtol=1e-3, atol=1e-5)
    assert own.shape == (N,)
    assert again[0].shape == (N, M)
