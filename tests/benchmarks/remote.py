"""Reading a store from a bucket, beside the same store on the local disk, and beside plain requests to the server."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import fsspec
import numpy as np
import torch

from lightning_trak import FeatureStore
from lightning_trak.store.remote import CACHE
from tests.benchmarks.measuring import print_table, seconds
from tests.store.s3 import s3_server

N_TRAIN, PROJ_DIM = 32_768, 2048
TOGETHER = 16  # plain requests, as many as the package sends


def run(n: int = N_TRAIN, k: int = PROJ_DIM) -> None:
    """Print the table."""
    note = "The server is Python on this machine, so requests have no way to go, and share its cores."
    header = ["what", "MB", "seconds"]
    print_table(f"Reading all features of a checkpoint, n = {n}, k = {k}", header, _rows(n, k), note)


def _rows(n: int, k: int) -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory() as root, s3_server() as variables:
        folder = Path(root)
        _fill(folder / "store", n, k)
        with mock.patch.dict(os.environ, variables | {CACHE: str(folder / "cache")}):
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # of a server that ran before
            system = fsspec.filesystem("s3", skip_instance_cache=True)
            system.mkdir("s3://bucket")
            system.put(str(folder / "store"), "s3://bucket/store", recursive=True)
            _read(folder / "store")  # the disk's own cache has it now
            cases: list[tuple[str, Callable[[], object]]] = [
                ("local disk", lambda: _read(folder / "store")),
                ("plain requests to the server", lambda: _plain(system, folder / "plain")),
                ("s3, first", lambda: _read("s3://bucket/store")),
                ("s3, from the copies", lambda: _read("s3://bucket/store")),
            ]
            for name, read in cases:
                yield [name, f"{4 * n * k / 1e6:.0f}", f"{seconds(read):.2f}"]


def _fill(path: Path, n: int, k: int) -> None:
    """Make a store of one checkpoint with random features."""
    rng = np.random.default_rng(0)
    manifest = {"n_train": n, "parameters": {}, "projection": {}}
    train = FeatureStore.create(path, manifest).add("checkpoint", {}, {"weight": torch.zeros(1)}).train
    for rows in train.missing():
        train.write(rows.start, {"features": rng.standard_normal((len(rows), k), dtype=np.float32)})


def _read(store: Path | str) -> None:
    """Open a store, and read the features of its checkpoint."""
    for block in FeatureStore(store)["checkpoint"].train.blocks(["features"], 4096):
        assert np.isfinite(block["features"][-1]).all()


def _plain(system: fsspec.AbstractFileSystem, folder: Path) -> None:
    """Copy the chunks, and do nothing with them."""
    names = system.ls("s3://bucket/store/checkpoints/checkpoint/train", detail=False)
    for start in range(0, len(names), TOGETHER):
        few = names[start : start + TOGETHER]
        system.get(few, [str(folder / Path(name).name) for name in few])
