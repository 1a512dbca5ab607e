"""Runs scenarios in forks, killed before an event if that is asked for, and records undisturbed runs."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.faults.events import Counter, Event, Watch
from tests.faults.forking import LIMIT, Ended, folder_for, in_a_fork
from tests.faults.scenarios import FORMER, SCENARIOS, Outcome


class Entry(NamedTuple):
    """An event of a run, with the content of the file that it is about, where that matters."""

    kind: str
    path: tuple[str, ...]
    target: tuple[str, ...]
    content: bytes | None


class Journal:
    """Writes down events with contents."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.entries = folder, []

    def __call__(self, event: Event) -> None:
        """Write down an event."""
        path, target = (self._parts(name) for name in (event.path, event.target or event.path))
        known = event.kind in ("fsync", "replace", "rename") and os.path.isfile(event.path)
        content = Path(event.path).read_bytes() if known else None
        if not event.path.endswith((".fork", ".value")):
            self.entries.append(Entry(event.kind, path, target, content))

    def _parts(self, name: str) -> tuple[str, ...]:
        return Path(os.path.relpath(name, self._folder)).parts


class Undisturbed(NamedTuple):
    """A run that nothing disturbed.

    Attributes:
        outcome: what it came to.
        entries: its journal.
        seconds: how long it took.
    """

    outcome: Outcome
    entries: list[Entry]
    seconds: float


@cache
def former(name: str) -> dict[str, bytes]:
    """Return the files that are there before a scenario, by path."""
    if name not in FORMER:
        return {}
    training, kept = FORMER[name]
    with folder_for("former") as folder:
        in_a_fork(lambda: training.fit(folder) and None, folder).succeeded()
        paths = sorted(path for path in (folder / kept).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def prepare(name: str, folder: Path) -> None:
    """Put into a folder what is there before a scenario."""
    for path, content in former(name).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def run(name: str, folder: Path, *, event: int = 0, seconds: float = LIMIT) -> Ended:
    """Run a scenario in a fork, until it is killed or ends; return its outcome."""

    def work() -> Outcome:
        Watch(folder, Counter(event))
        return SCENARIOS[name](folder)

    return in_a_fork(work, folder, seconds)


def undisturbed(name: str) -> Undisturbed:
    """Run a scenario without a fault, and write its journal."""
    with folder_for("undisturbed") as folder:
        prepare(name, folder)

        def work() -> tuple[Outcome, list[Entry]]:
            journal = Journal(folder)
            Watch(folder, journal)
            return SCENARIOS[name](folder), journal.entries

        start = time.monotonic()
        outcome, entries = in_a_fork(work, folder).succeeded()
        return Undisturbed(outcome, entries, time.monotonic() - start)
