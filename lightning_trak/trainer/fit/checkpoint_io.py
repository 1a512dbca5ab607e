"""Watches which checkpoint files are written and deleted; `queue` decides what follows."""

from __future__ import annotations

import os
from typing import Any, Protocol

from lightning_trak.trainer.host.framework import CheckpointIO, Trainer


class Listener(Protocol):
    """What is told about checkpoint files."""

    def file_saved(self, path: str, checkpoint: dict[str, Any]) -> None:
        """Handle a file that was written, and its content."""

    def file_removed(self, path: str) -> None:
        """Handle a file that was deleted."""

    def saved(self) -> None:
        """Note, in every process, that one of them may have written files."""


def watch(trainer: Trainer, listener: Listener) -> None:
    """Tell a listener of the checkpoint files that a trainer writes and deletes."""
    strategy = trainer.strategy
    watched = strategy.checkpoint_io
    inner = watched.inner if isinstance(watched, WatchedCheckpointIO) else watched
    strategy.checkpoint_io = WatchedCheckpointIO(inner, listener)
    if trainer.world_size > 1:  # the first process alone writes files, and all take part in saving
        vars(strategy).pop("save_checkpoint", None)  # of an earlier fit
        save = strategy.save_checkpoint

        def save_and_tell(*args: Any, **kwargs: Any) -> None:
            save(*args, **kwargs)
            listener.saved()

        vars(strategy)["save_checkpoint"] = save_and_tell


class WatchedCheckpointIO(CheckpointIO):
    """Tells a listener of every checkpoint file that is written or deleted.

    The callback hook ``on_save_checkpoint`` is not enough. It runs before other callbacks and the module put averaged
    weights in, it does not know the path, and ``save_weights_only=True`` skips it.
    """

    def __init__(self, inner: CheckpointIO, listener: Listener) -> None:
        self.inner = inner
        self._listener = listener

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file, then tell the listener."""
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        self._listener.file_saved(os.fspath(path), checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file."""
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file, then tell the listener."""
        self.inner.remove_checkpoint(path)
        self._listener.file_removed(os.fspath(path))

    def teardown(self) -> None:
        """Let the writer finish."""
        self.inner.teardown()
