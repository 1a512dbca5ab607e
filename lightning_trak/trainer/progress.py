"""Progress bars, if the user's trainer shows any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def progress(trainer: Any, description: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a progress bar if the trainer shows any; yield the function that advances it."""
    callback = trainer.progress_bar_callback
    hidden = callback is None or getattr(callback, "is_disabled", False) or not trainer.is_global_zero
    rich = getattr(callback, "progress", None)
    if not hidden and rich is not None and rich.live.is_started:  # nothing else may print beside its live display
        task = rich.add_task(description, total=total)
        try:
            yield lambda n: rich.update(task, advance=n)
        finally:
            rich.remove_task(task)
        return
    with tqdm(total=total, desc=description, disable=hidden, leave=False, dynamic_ncols=True) as bar:
        yield bar.update
