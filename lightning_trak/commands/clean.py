"""``clean``: delete what killed processes left, what is damaged and can be computed again, and what the user names."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_trak.commands.opening import DIGITS, find_checkpoint, open_store
from lightning_trak.commands.scores import arrays_without_index, score_folders
from lightning_trak.commands.verify import reading
from lightning_trak.results.terminal import count, printable, size_text, table
from lightning_trak.store.inspection import checkpoints_of, inspect_checkpoint, inspect_targets, size_of
from lightning_trak.store.leftovers import Leftover, checkpoint_kept, leftovers, targets_of
from lightning_trak.store.store import FeatureStore


class _Checkpoint(Leftover):
    """A checkpoint that the user named: it goes with its weights, unless a process computes features at it."""

    def kept(self) -> str:
        """Say why it must not be deleted now; an empty text if it may."""
        return checkpoint_kept(FeatureStore(self.root), self.path.name)

    def delete(self) -> bool:
        """Delete it if that is still right; say whether it is gone."""
        if self.kept():
            return False
        FeatureStore(self.root).discard(self.path.name)
        return True


def clean(path: Path, *, yes: bool = False, targets: bool = False, checkpoint: Sequence[str] | None = None) -> int:
    """List what can be deleted, ask, and delete it.

    Returns:
        The exit status: 0, or 1 if something could not be deleted, or nobody could be asked.
    """
    store = open_store(path)
    named = [find_checkpoint(store, digits) for digits in checkpoint or ()]
    found = list(_found(store, named, targets=targets))
    kept = [(one, one.kept()) for one in found]
    going = [one for one, why in kept if not why]
    _print_table(store, "to delete", [(one, one.why) for one in going])
    _print_table(store, "left alone", [(one, f"{one.why}, but {why}") for one, why in kept if why])
    if not going:
        print("Nothing to delete.")
        return 0
    size = size_text(sum(one.size for one in going))
    if not yes and not _agreed(f"Delete {count(len(going), 'item')}, {size}?"):
        return 0 if sys.stdin.isatty() else 1
    return _delete(store, going)


def _found(store: FeatureStore, named: Sequence[str], *, targets: bool) -> Iterator[Leftover]:
    """Yield what can be deleted; nothing that is in a folder that goes as a whole."""
    whole: list[Leftover] = []
    for digest in dict.fromkeys(named):
        place = store.root / "checkpoints" / digest
        whole.append(_Checkpoint(store.root, place, "checkpoint with its weights", size_of(place)))
    whole += targets_of(store) if targets else []
    yield from whole
    arrays = [path for folder in score_folders(store) for path in arrays_without_index(folder)]
    unfinished = [Leftover(store.root, path, "unfinished", size_of(path)) for path in arrays]
    for one in (*leftovers(store), *unfinished, *_damaged(store)):
        if not any(one.path.is_relative_to(folder.path) for folder in whole):
            yield one


def _damaged(store: FeatureStore) -> Iterator[Leftover]:
    """Yield damaged files that can be computed again; all files are read."""
    with reading(store) as advance:
        states = [inspect_checkpoint(store, *item, advance) for item in checkpoints_of(store).items()]
        problems = [problem for state in states for problem in state.problems]
        problems += inspect_targets(store, states, advance)[1]
    for problem in problems:
        if problem.check is not None and problem.path.exists():
            yield Leftover(store.root, problem.path, "damaged", size_of(problem.path), problem)


def _print_table(store: FeatureStore, title: str, items: Sequence[tuple[Leftover, str]]) -> None:
    """Print sizes, reasons and paths; files of one folder with the same reason are one line."""
    groups: dict[tuple[Path, str], list[Leftover]] = {}
    for one, why in items:
        groups.setdefault((one.path if one.path.is_dir() else one.path.parent, why), []).append(one)
    lines = []
    for (folder, why), ones in groups.items():
        where = _short_path(store, folder if ones[1:] else ones[0].path)
        number = f": {count(len(ones), 'file')}" if ones[1:] else ""
        lines.append((size_text(sum(one.size for one in ones)), why, where + number))
    if lines:
        print(table([("size", "why", title), *lines], right="size") + "\n")


def _short_path(store: FeatureStore, path: Path) -> str:
    """Return a path in the store, with digests cut as `info` shows them."""
    name = path.relative_to(store.root).as_posix()
    return re.sub(rf"\b([0-9a-f]{{{DIGITS}}})[0-9a-f]{{{32 - DIGITS}}}\b", r"\1...", name)


def _agreed(question: str) -> bool:
    """Ask the user; without a terminal, say that nothing is deleted."""
    if not sys.stdin.isatty():
        print("Nothing was deleted: there is no terminal to ask at. Pass --yes to delete.", file=sys.stderr)
        return False
    answer = input(f"{question} [y/N] ").strip().lower()
    if answer in ("y", "yes"):
        return True
    print("Nothing was deleted.")
    return False


def _delete(store: FeatureStore, items: Sequence[Leftover]) -> int:
    """Delete, say how much, and return the exit status."""
    gone, failed = [], 0
    for one in items:
        name = printable(str(one.path.relative_to(store.root)))
        try:
            if one.delete():
                gone.append(one)
            else:
                print(f"Left alone: {name}; another process has taken or mended it since.")
        except OSError as error:
            failed += 1
            print(f"'{name}' could not be deleted: {error.strerror or error}", file=sys.stderr)
    print(f"Deleted: {count(len(gone), 'item')}, {size_text(sum(one.size for one in gone))}.")
    return 1 if failed else 0
