"""Locks of the store, seen from outside: who holds one, and how to take one without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def taken(path: Path, *, delete: bool = False) -> Iterator[bool]:
    """Hold a lock for a moment, if it is free; yield whether it is. A file that was made for this is deleted again.

    Another process that tries the lock in this moment finds it held, as if a third process worked there.

    Args:
        path: the lock's file.
        delete: whether to delete the file at the end also if it was there before.

    Raises:
        OSError: if it cannot be told, since this process may not write there.
    """
    before = _identity(path)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        if delete or _identity(path) != before:
            with suppress(OSError):  # Windows does not delete what is open
                path.unlink()
        lock.release()


def is_held(path: Path) -> bool | None:
    """Say whether a living process holds a lock; None if that cannot be told, since this process may not write there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lock = FileLock(Path(folder, "example.lock"))
    ...     with lock:
    ...         held = is_held(Path(folder, "example.lock"))
    ...     held, is_held(Path(folder, "example.lock")), is_held(Path(folder, "none.lock"))
    (True, False, False)
    """
    if not path.exists():
        return False
    try:
        with taken(path) as free:
            return not free
    except OSError:
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another of the same name; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
