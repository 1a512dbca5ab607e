"""Finds and reads the checkpoint files of a run that is resumed; `whole_path`: the one path of a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_trak.store.weights import read_checkpoint
from lightning_trak.trainer.host.framework import Trainer, rank_zero_warn


def whole_path(path: str | os.PathLike[str]) -> str:
    """Return the one path of a file, whatever links lead to it; URLs stay."""
    text = os.fspath(path)
    return text if "://" in text else os.path.realpath(text)


def checkpoint_files(trainer: Trainer, known: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and content of each checkpoint file that a resumed run may have written, and that can be read.

    These are files at known paths, that which training resumes from, and all in its folder and in those of the
    trainer's checkpoint callbacks.
    """
    for path in dict.fromkeys(map(whole_path, [*known, *_candidates(trainer)])):
        if not os.path.isfile(path):
            continue
        try:
            yield path, dict(read_checkpoint(path))
        except (OSError, ValueError) as error:
            rank_zero_warn(f"Whether a checkpoint file is of this run cannot be told: {error}")


def _candidates(trainer: Trainer) -> Iterator[str]:
    savers = list(trainer.checkpoint_callbacks)
    folders = [(getattr(one, "dirpath", None), getattr(one, "FILE_EXTENSION", ".ckpt")) for one in savers]
    if trainer.ckpt_path is not None and os.path.isfile(trainer.ckpt_path):
        yield os.fspath(trainer.ckpt_path)
        folders.append((os.path.dirname(whole_path(trainer.ckpt_path)), ".ckpt"))
    for folder, extension in folders:
        if folder and Path(folder).is_dir():
            yield from map(str, sorted(Path(folder).glob(f"*{extension}")))
