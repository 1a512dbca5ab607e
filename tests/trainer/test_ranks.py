"""Several processes: rows, features and scores are those of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_trak import Attribution, FeatureStore
from tests.trainer.ranks import M, N

PROGRAM = "tests.trainer.ranks"
OTHERS = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}


def run(folder, strategy, world, *files, **variables):
    folder.mkdir()
    command = [sys.executable, "-m", PROGRAM, folder, strategy, str(world), *files]
    done = subprocess.run(command, env=OTHERS | variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt")


def run_together(folder, commands):
    """Run several programs at the same time: (command, environment) of each."""
    folder.mkdir()
    running = [
        subprocess.Popen(list(map(str, command)), env=OTHERS | variables, stderr=subprocess.PIPE, text=True)
        for command, variables in commands
    ]
    try:
        for process in running:
            error = process.communicate(timeout=300)[1]
            assert process.returncode == 0, error[-3000:]
    finally:
        for process in running:
            process.kill()
    return torch.load(folder / "found.pt")


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


def by_torchrun(folder, files):
    """Two processes of one node."""
    options = ["--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [([sys.executable, "-m", "torch.distributed.run", *options, "-m", PROGRAM, folder, "ddp", 2, *files], {})]


def by_torchrun_on_two_nodes(folder, files):
    """A process of each; the nodes share the folder, and here the machine too."""
    options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    whole = [sys.executable, "-m", "torch.distributed.run", *options]
    return [([*whole, f"--node_rank={node}", "-m", PROGRAM, folder, "ddp", "2x1", *files], {}) for node in range(2)]


def by_slurm(folder, files):
    """What ``srun`` sets for two tasks of one node."""
    port = free_port()

    def variables(task):
        job = {"JOB_ID": "1", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NODELIST": "127.0.0.1"}
        own = {"PROCID": str(task), "LOCALID": str(task), "NODEID": "0", "NNODES": "1"}
        return {f"SLURM_{name}": value for name, value in (job | own).items()} | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }

    return [([sys.executable, "-m", PROGRAM, folder, "ddp", 2, *files], variables(task)) for task in range(2)]


def assert_same(found, expected):
    """Up to rounding: stored entries have 11 bits, and a score may be a small difference of large products."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


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
    assert_same(scores, found[0])
    assert_same(own, found[1])
    shared = FeatureStore(tmp_path / "run" / "store")
    assert sorted(shared.digests) == sorted(store.digests)
    for entry in shared:
        (one,), (other,) = (each.train.blocks(None, N) for each in (entry, store[entry.digest]))
        for name in ("loss_grad", "curvature", "outputs"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5)
    assert torch.equal(Attribution.load(shared.scores_dir("kept")).scores, scores)
    for path in (tmp_path / "run").glob("top-*.json"):
        assert json.loads(path.read_text()) == scores.topk(2, 0).indices.T.tolist()
    (targets,) = (shared.dirpath / "targets").iterdir()
    for entry in shared:
        assert entry.targets(targets.name, M, 1).complete


def test_fewer_examples_than_processes(tmp_path, alone):
    files, few = [*map(str, alone[0])], {"N_TRAIN": "2", "N_TARGETS": "1"}
    one = run(tmp_path / "one", "auto", 1, *files, **few)
    three = run(tmp_path / "three", "ddp", 3, *files, **few)
    assert three[0].shape == (2, 1)
    for found, expected in zip(three, one, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("launcher", [by_torchrun, by_torchrun_on_two_nodes, by_slurm])
def test_launchers_of_clusters(tmp_path, alone, launcher):
    files, _, found = alone
    scores, own = run_together(tmp_path / "run", launcher(tmp_path / "run", files))
    assert_same(scores, found[0])
    assert_same(own, found[1])
    store = FeatureStore(tmp_path / "run" / "store")
    assert len(store) == len(files)
    assert all(entry.complete for entry in store)


@pytest.mark.parametrize(("case", "variables"), [("ddp 2", {}), ("ddp 2", {"BUDGET": "0"}), ("ddp_notebook 2", {})])
def test_training_in_two_processes_leaves_a_complete_store(tmp_path, case, variables):
    """Also with a sampler of the user's, which pads, with files that hold weights alone, and with a budget."""
    scores, own = run(tmp_path / "run", *case.split(), **variables)
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
