"""Trainings: on random halves of the train set for the ground truth, and on all of it for the checkpoints."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_trak import retrain_subsets
from lightning_trak.evaluation.ground_truth import GroundTruth
from tests.benchmarks.measuring import silence, trainer
from tests.benchmarks.quality.every_task import TASKS, digest_of_code, packages

PROCESSES = 2


def check_folder(key: str, root: Path) -> None:
    """Raise if what ``root`` has of a task comes from other tasks or versions than those of now."""
    versions = [f"{package} {version(package)}" for package in packages(key)]
    here = "\n".join([digest_of_code(key), f"python {platform.python_version()}", *versions])
    folder, note = root / key, root / key / "made_with"
    if not folder.exists():
        folder.mkdir(parents=True)
        note.write_text(here)
    if not note.exists() or note.read_text() != here:
        raise ValueError(
            f"'{folder}' was made with other tasks, or with other versions of what they use. Delete it, or pass"
            " another root."
        )


def ground_truth(key: str, root: Path, n_subsets: int, repeats: int) -> GroundTruth:
    """Retrain on random halves, in several processes of one thread each; what ``root`` has already is kept."""
    command = [sys.executable, "-m", "tests.benchmarks.quality.runs", key, str(root), str(n_subsets), str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(PROCESSES)]
    statuses = [worker.wait() for worker in workers]
    if any(statuses):
        raise RuntimeError(f"A training for the ground truth of {key!r} failed: {' '.join(command)}")
    return _retrain(key, root, n_subsets, repeats)


def _retrain(key: str, root: Path, n_subsets: int, repeats: int) -> GroundTruth:
    task = TASKS[key]

    def make_trainer() -> L.Trainer:
        return trainer(root, accelerator="cpu", max_epochs=task.epochs, enable_checkpointing=False)

    return retrain_subsets(
        task.make_module, task.data(), make_trainer, n_subsets, repeats=repeats, dirpath=root / key / "truth"
    )


def train_run(key: str, root: Path, seed: int) -> list[Path]:
    """Train on the whole train set, a checkpoint an epoch; return the files. Kept like the ground truth."""
    return train(key, root, TASKS[key].data(), root / key / f"run{seed}", seed)


def train(key: str, root: Path, data: Any, folder: Path, seed: int) -> list[Path]:
    """Train a task's model on any data, unless ``folder`` has it; return the files, a checkpoint an epoch."""
    task = TASKS[key]
    if not (folder / "seconds").exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        L.seed_everything(seed, verbose=False)
        saving = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch:03d}", enable_version_counter=False)
        own = trainer(root, saving, accelerator="cpu", max_epochs=task.epochs)
        start = time.perf_counter()
        own.fit(task.make_module(), datamodule=data)
        (folder / "seconds").write_text(str(time.perf_counter() - start))
    return sorted(folder.glob("*.ckpt"))


def training_seconds(key: str, root: Path, seed: int) -> float:
    """Return how long a run of `train_run` took."""
    return float((root / key / f"run{seed}" / "seconds").read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with silence():
        _retrain(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
