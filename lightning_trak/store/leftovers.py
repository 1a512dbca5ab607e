"""What killed processes leave in a store, and what can be computed again: found, and deleted with care.

A living process must not lose what it is writing. So nothing is deleted

- of which the lock is held: the process that computes a chunk or a curvature holds its lock until it is written;
- that changed within the last hour: of other unfinished files no lock says whether a process writes them. A process
  that is stopped for longer, in the middle of a file, ends with an error and can be started again;
- that lies behind a symbolic link.

Before deletion all of this is looked at again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_trak.store.files import Damaged
from lightning_trak.store.inspection import CHUNK_LOCK, FOLDERS, REMOVED, UNFINISHED, Problem, listed, size_of
from lightning_trak.store.locks import is_held, taken
from lightning_trak.store.store import FeatureStore

SECONDS = 3600.0  # for which a file must not have changed


@dataclass(frozen=True)
class Leftover:
    """Something that can be deleted.

    Attributes:
        root: the directory of the store.
        path: of the file or folder.
        why: what it is.
        size: in bytes.
        damaged: the damage that makes it useless; None if it is of no use anyway.
    """

    root: Path
    path: Path
    why: str
    size: int
    damaged: Problem | None = None

    def kept(self) -> str:
        """Say why it must not be deleted now; an empty text if it may."""
        if _is_behind_a_link(self.path, self.root):
            return "it is behind a symbolic link"
        if self.damaged is not None or CHUNK_LOCK.fullmatch(self.path.name):
            return _of_locks([_lock_of(self.path)])
        held = _of_locks(_locks_in(self.path) if self.path.is_dir() else [_lock_of(self.path)])
        age = time.time() - _changed(self.path)
        return held or ("" if age >= SECONDS else f"it changed {max(0, age) / 60:.0f} minutes ago")

    def delete(self) -> bool:
        """Delete it if that is still right; say whether it is gone.

        Raises:
            OSError: if it cannot be deleted.
        """
        if not os.path.lexists(self.path):
            return True
        if self.kept():
            return False
        if self.damaged is not None:
            return _delete_damaged(self.path, self.damaged)
        if CHUNK_LOCK.fullmatch(self.path.name):
            with taken(self.path, delete=True) as free:
                return free
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)
        return True


def leftovers(store: FeatureStore) -> list[Leftover]:
    """Return what killed processes have left, also what must not be deleted yet; see `Leftover.kept`."""
    found = [path for path in listed(store.root) if UNFINISHED.fullmatch(path.name)]
    removed = [path for path in listed(store.root) if REMOVED.fullmatch(path.name) and path.is_dir()]
    for name in FOLDERS:
        found += _found_in(store.root / name)
    kinds = [(path, "an idle lock" if CHUNK_LOCK.fullmatch(path.name) else "unfinished") for path in found]
    kinds += [(path, "of a store that was overwritten") for path in removed]
    return [Leftover(store.root, path, why, size_of(path)) for path, why in kinds if not path.is_symlink()]


def _found_in(folder: Path) -> Iterator[Path]:
    """Yield unfinished files and idle locks in a folder, without following symbolic links."""
    if folder.is_symlink():
        return
    for path in listed(folder):
        if UNFINISHED.fullmatch(path.name) or (CHUNK_LOCK.fullmatch(path.name) and is_held(path) is False):
            yield path
        elif path.is_dir():
            yield from _found_in(path)


def targets_of(store: FeatureStore) -> list[Leftover]:
    """Return the stored features of targets, which a call with the same targets would compute again."""
    found = [path for path in listed(store.root / "targets") if path.is_dir()]
    return [Leftover(store.root, path, "features of targets", size_of(path)) for path in found]


def checkpoint_kept(store: FeatureStore, digest: str) -> str:
    """Say why a checkpoint that the user wants to delete must stay for now; an empty text if it may go."""
    path = store.root / "checkpoints" / digest
    return "it is behind a symbolic link" if _is_behind_a_link(path, store.root) else _of_locks(_locks_in(path))


def _is_behind_a_link(path: Path, root: Path) -> bool:
    """Say whether a path, or a folder between it and the store's directory, is a symbolic link."""
    return path != root and (path.is_symlink() or _is_behind_a_link(path.parent, root))


def _delete_damaged(path: Path, problem: Problem) -> bool:
    """Delete a damaged file, while nobody can write it, unless another process has mended it."""
    with taken(_lock_of(path)) as free:
        if not free:
            return False
        try:
            assert problem.check is not None
            problem.check()
        except Damaged:
            path.unlink(missing_ok=True)
            return True
        return False


def _lock_of(path: Path) -> Path:
    """Return the lock under which a file is written: 0000000064.safetensors and its unfinished forms have one lock.

    >>> _lock_of(Path("train/0000000064.safetensors")).name
    '0000000064.lock'
    """
    return path.with_name(f"{path.name.partition('.')[0]}.lock")


def _of_locks(locks: list[Path]) -> str:
    """Say that one of these locks is held; an empty text if none is."""
    for lock in locks:
        held = is_held(lock)
        if held is None:
            return f"whether {lock.name} is held cannot be told"
        if held:
            return "a process is working at it"
    return ""


def _locks_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.lock"))


def _changed(path: Path) -> float:
    """Return when something in a file or folder changed last: now, if something disappears meanwhile."""
    try:
        inner = path.rglob("*") if path.is_dir() else ()
        return max(one.lstat().st_mtime for one in (path, *inner))
    except FileNotFoundError:
        return time.time()
