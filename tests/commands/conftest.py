"""Stores of real trainings, which the tests copy and damage."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_trak import TRAKCallback
from lightning_trak.__main__ import main
from tests.conftest import Blobs, Classifier, make_trainer

N = 150
KINDS = ("kronecker", "none")  # with a curvature, or with sums over the train set


def data():
    return Blobs(n=N)


def trainer_of(folder, kind):
    return make_trainer(folder, TRAKCallback(folder / "store", preconditioner=kind, proj_dim=16), max_epochs=2)


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    """A store of each kind: two checkpoints of one run in chunks of 64 rows, and scores."""
    folder = tmp_path_factory.mktemp("made")
    L.seed_everything(0, verbose=False)
    make_trainer(folder, ModelCheckpoint(folder / "files", save_top_k=-1), max_epochs=2).fit(Classifier(), data())
    files = sorted((folder / "files").glob("*.ckpt"))
    for kind in KINDS:
        trainer = trainer_of(folder / kind, kind)
        trainer.attribute(Classifier(), datamodule=data(), ckpt_path=files, name="blobs")
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def store(_made, kind, tmp_path):
    """A copy of a store, of either kind."""
    return Path(shutil.copytree(_made / kind / "store", tmp_path / "store"))


@pytest.fixture
def run(capsys):
    """Run a command; return its exit status, and what it prints to stdout and stderr."""

    def call(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


def checkpoints(store):
    return sorted(path for path in (store / "checkpoints").iterdir())


def chunk(store, number=0, start=0):
    return checkpoints(store)[number] / "train" / f"{start:010d}.safetensors"


def flip(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def tree(folder):
    """Every file with its content, and every folder and link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        whole = path.is_file() and not path.is_symlink()
        found[path.relative_to(folder).as_posix()] = path.read_bytes() if whole else path.is_symlink()
    return found


def age(path, seconds=4000):
    """Let a file, or a folder with all that is in it, be untouched for some time."""
    then = time.time() - seconds
    for one in [*path.rglob("*"), path]:
        os.utime(one, (then, then), follow_symlinks=False)
