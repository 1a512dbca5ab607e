"""Progress bars, if the user's trainer shows any; in a notebook they share one line of the cell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from time import monotonic
from typing import Any

from tqdm import tqdm

from lightning_trak.trainer.host.reports import time_text

_PAUSE = 0.2  # seconds between updates in a notebook, at least


@contextmanager
def progress(trainer: Any, description: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a progress bar if the trainer shows any; yield the function that advances it."""
    callback = trainer.progress_bar_callback
    hidden = callback is None or getattr(callback, "is_disabled", False) or not trainer.is_global_zero
    rich = getattr(callback, "progress", None)
    shell = None if hidden else _notebook()
    if not hidden and rich is not None and rich.live.is_started:  # nothing else may print beside its live display
        task = rich.add_task(description, total=total)
        try:
            yield lambda n: rich.update(task, advance=n)
        finally:
            rich.remove_task(task)
        return
    if shell is not None:
        with _line_of(shell.execution_count).bar(description, total) as advance:
            yield advance
        return
    with tqdm(total=total, desc=description, disable=hidden, leave=False, dynamic_ncols=True) as bar:
        yield bar.update


def _notebook() -> Any:
    """Return the shell of the notebook in which this runs; None elsewhere."""
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return shell if hasattr(shell, "kernel") else None


@lru_cache(maxsize=1)
def _line_of(cell: int) -> _Line:
    """Return the line of a cell by its number: of many bars of a cell, one line is left."""
    return _Line()


class _Line:
    """A line of text below a notebook's cell that changes in place."""

    def __init__(self) -> None:
        self._began, self._shown = monotonic(), -_PAUSE
        self._display = sys.modules["IPython"].display.display({"text/plain": ""}, raw=True, display_id=True)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int], object]]:
        """Show how far something is; yield the function that advances it."""
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            if monotonic() - self._shown >= _PAUSE:
                self._show(f"{description}: {done} of {total}")

        advance(0)
        yield advance
        self._show(f"{description}: done. {time_text(monotonic() - self._began)} in this cell.")

    def _show(self, text: str) -> None:
        self._shown = monotonic()
        self._display.update({"text/plain": text}, raw=True)
