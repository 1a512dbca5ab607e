"""The checkpoint files of a run that is resumed: what happened to them while nobody watched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_trak.influence.training_time import CHECKPOINT_KEY
from lightning_trak.store.weights import read_checkpoint
from lightning_trak.trainer.framework import Trainer, rank_zero_warn


def files_of_run(trainer: Trainer, run: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and content of each checkpoint file that a run has written, as far as it is still there.

    These are the file that training resumes from, and those in the folders of the trainer's checkpoint callbacks.
    """
    for path in dict.fromkeys(_candidates(trainer)):
        try:
            checkpoint = dict(read_checkpoint(path))
        except (OSError, ValueError) as error:
            rank_zero_warn(f"Whether a checkpoint file is of this run cannot be told: {error}")
            continue
        if checkpoint.get(CHECKPOINT_KEY, {}).get("run") == run:
            yield path, checkpoint


def _candidates(trainer: Trainer) -> Iterator[str]:
    for callback in trainer.checkpoint_callbacks:
        folder = Path(getattr(callback, "dirpath", None) or "")
        extension = getattr(callback, "FILE_EXTENSION", ".ckpt")
        if folder.is_absolute() and folder.is_dir():
            yield from (str(path) for path in sorted(folder.glob(f"*{extension}")) if path.is_file())
    if trainer.ckpt_path is not None and os.path.isfile(trainer.ckpt_path):
        yield os.path.abspath(trainer.ckpt_path)
