"""Watches checkpoint files, whoever writes them."""

from __future__ import annotations

import os
from typing import Any, Protocol

from lightning_trak.trainer.framework import CheckpointIO


class Listener(Protocol):
    """What wants to know of checkpoint files."""

    def file_saved(self, path: str, checkpoint: dict[str, Any]) -> None:
        """Take note of a file, and of what was written into it."""

    def file_removed(self, path: str) -> None:
        """Take note that a file was deleted."""


class WatchedCheckpointIO(CheckpointIO):
    """Tells a listener of every checkpoint file written or deleted, whoever does it and with whatever options.

    The callback hook ``on_save_checkpoint`` would not do: it runs before other callbacks and the module have put
    averaged weights in, knows no path, and is not called with ``save_weights_only=True``.
    """

    def __init__(self, inner: CheckpointIO, listener: Listener) -> None:
        self.inner = inner
        self._listener = listener

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file, then tell of it."""
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        self._listener.file_saved(os.fspath(path), checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file."""
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file, then tell of it."""
        self.inner.remove_checkpoint(path)
        self._listener.file_removed(os.fspath(path))

    def teardown(self) -> None:
        """Let the writer finish."""
        self.inner.teardown()
