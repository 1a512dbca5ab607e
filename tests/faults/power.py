"""Cuts the power after any event of a run: what was not brought to the disk may be lost. A rerun must come to the same.

A file that was not synchronised is as it was before, empty, cut off or full of zeros. A name that was made, replaced or
deleted since its folder was synchronised may be as before. Folders are there as soon as something in them is on the
disk, as on all usual file systems. What Lightning writes is taken to be on the disk: it is not ours to synchronise.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.comparing import Expected
from tests.faults.forking import folder_for
from tests.faults.running import Entry, Undisturbed, former, run
from tests.faults.trials import Found, shared

OURS = ("store", "retraining")


@dataclass
class File:
    """A file: what a reader sees, and what is on the disk."""

    content: bytes = b""
    synced: bytes | None = None

    def after_cut(self, drawn: random.Random) -> bytes:
        """Return what may be left of it."""
        if self.synced == self.content:
            return self.content
        half = len(self.content) // 2
        return drawn.choice([self.synced or b"", b"", self.content[:half], bytes(len(self.content)), self.content])


@dataclass
class Folder:
    """A folder: what it holds, and what of that is on the disk; changes that may not be."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[dict[str, File | Folder | None]] = field(default_factory=list)

    def change(self, change: dict[str, File | Folder | None]) -> None:
        """Make and delete names in one step."""
        self.now = applied(self.now, change)
        self.pending.append(change)

    def sync(self) -> None:
        """Bring the names to the disk."""
        self.synced, self.pending = dict(self.now), []

    def after_cut(self, drawn: random.Random) -> dict[str, File | Folder]:
        """Return the names that may be left: each change may have reached the disk."""
        left = self.synced
        for change in self.pending:
            left = applied(left, change) if drawn.random() < 0.5 else left
        return left


def applied(names: dict[str, File | Folder], change: dict[str, File | Folder | None]) -> dict[str, File | Folder]:
    """Return names after a change, in which None deletes."""
    return {name: node for name, node in {**names, **change}.items() if node is not None}


class Disk:
    """What is on the disk after the first entries of a journal.

    Args:
        entries: what happened.
        former: the files that were there before, by path.
    """

    def __init__(self, entries: list[Entry], former: dict[str, bytes]) -> None:
        self.root = Folder()
        for path, content in former.items():
            self._do(Entry("fsync", Path(path).parts, Path(path).parts, content))
            self._folder(Path(path).parts[:-1]).sync()
        for entry in entries:
            self._do(entry)

    def _do(self, entry: Entry) -> None:
        parent, name = self._folder(entry.path[:-1]), entry.path[-1]
        if entry.kind == "create":
            parent.change({name: File()})
        elif entry.kind == "mkdir" and name not in parent.now:
            parent.change({name: Folder()})
        elif entry.kind in ("unlink", "remove", "rmdir"):
            parent.change({name: None})
        elif entry.kind in ("replace", "rename"):
            self._move(entry, parent)
        elif entry.kind == "fsync":
            self._sync(entry)
        if entry.target[0] not in OURS:
            self._folder(entry.target[:-1]).sync()

    def _move(self, entry: Entry, parent: Folder) -> None:
        target, node = self._folder(entry.target[:-1]), parent.now.get(entry.path[-1]) or File()
        if isinstance(node, File):
            node.content = entry.content
            if entry.target[0] not in OURS:
                node.synced = entry.content
        if target is parent:
            parent.change({entry.path[-1]: None, entry.target[-1]: node})
        else:
            parent.change({entry.path[-1]: None})
            target.change({entry.target[-1]: node})

    def _sync(self, entry: Entry) -> None:
        node = self._node(entry.path)
        if isinstance(node, Folder):
            node.sync()
        else:
            node.content = node.synced = entry.content
        for depth in range(1, len(entry.path)):
            name = entry.path[depth - 1]
            above = self._folder(entry.path[: depth - 1])
            above.synced = applied(above.synced, {name: above.now[name]})

    def _node(self, path: tuple[str, ...]) -> File | Folder:
        parent = self._folder(path[:-1])
        return parent.now.setdefault(path[-1], File())

    def _folder(self, path: tuple[str, ...]) -> Folder:
        folder = self.root
        for name in path:
            folder = folder.now.setdefault(name, Folder())
        return folder

    def build(self, path: Path, drawn: random.Random) -> None:
        """Make a folder as it may be after the power is cut now."""
        _build(self.root, path, drawn)


def _build(folder: Folder, path: Path, drawn: random.Random) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, node in folder.after_cut(drawn).items():
        if isinstance(node, Folder):
            _build(node, path / name, drawn)
        else:
            (path / name).write_bytes(node.after_cut(drawn))


class Cuts:
    """Recorded runs, to be cut anywhere."""

    def __init__(self, runs: dict[str, Undisturbed]) -> None:
        self._runs, self._expected = runs, Expected(runs)

    def trial(self, seed: int) -> Found:
        """Cut a run where a seed says, run it again, and compare."""
        drawn = random.Random(seed)
        name = drawn.choice(list(self._runs))
        entries = self._runs[name].entries
        at = drawn.randint(1, len(entries))
        with folder_for("cut") as folder:
            Disk(entries[:at], former(name)).build(folder, drawn)
            last, ended = entries[at - 1], run(name, folder)
            story = f"seed {seed}: cut after event {at}, {last.kind} {'/'.join(last.path)} {'/'.join(last.target)}."
            if ended.status:
                return Found("power", name, "failed", f"{story} The rerun failed: {ended.end}")
            wrong = self._expected.wrong(name, folder, ended.value)
            return Found("power", name, "wrong" if wrong else "right", f"{story} {'; '.join(wrong)}")


def cut_all(runs: dict[str, Undisturbed], count: int, jobs: int, seed: int) -> Iterable[Found]:
    """Cut the power ``count`` times."""
    yield from shared(Cuts(runs).trial, range(seed * count, (seed + 1) * count), jobs)
