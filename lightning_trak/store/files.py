"""Files of the store: written whole or not at all, with a checksum inside."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning_trak.store.remote import AnyPath, RemotePath, local_folder, reading

_BLOCK = 2**24
_CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.ENOTSUP)  # says a file system
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTIAL = ".partial"  # the end of the name of a file that is being written
_COPY = "Copy it again from the local store. If it is damaged there too, trainer.attribute(...) there says what to do."


class Damaged(ValueError):
    """A file is not what was written.

    Attributes:
        path: of the file.
        why: what is wrong with it.
    """

    def __init__(self, path: AnyPath, why: str, remedy: str = "") -> None:
        remedy = _COPY if isinstance(path, RemotePath) else remedy
        super().__init__(f"'{path}' is damaged: {why.rstrip('.')}. {remedy}".rstrip())
        self.path, self.why, self._remedy = path, why, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it be pickled: processes of a pool send their errors so."""
        return type(self), (self.path, self.why, self._remedy)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _CANNOT_SYNC_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def check_own(folder: AnyPath) -> None:
    """Raise if a folder is a symbolic link: what it leads to is not the store's to delete."""
    if folder.is_symlink():
        raise Damaged(folder, "it is a symbolic link", "Put the folder itself there.")


@contextmanager
def explained_reading(path: Path) -> Iterator[None]:
    """Tell a file that cannot be read from one that is missing, which is a FileNotFoundError, or is a folder."""
    try:
        yield
    except FileNotFoundError:
        raise
    except IsADirectoryError as error:
        raise Damaged(path, "it is a folder") from error
    except OSError as error:
        raise type(error)(
            error.errno,
            f"'{path}' cannot be read: {error.strerror or error}. Check its permissions, the limit of open files"
            " (ulimit -n) and the disk",
        ) from error


def checksum_of_file(path: Path) -> int:
    """Return the CRC-32 of a file, which is read block by block."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def checksum_of(value: Any) -> int:
    """Return the CRC-32 of a value that JSON can hold; the order of keys does not matter.

    >>> checksum_of({"a": 1, "b": (2, 3)}) == checksum_of({"b": [2, 3], "a": 1})
    True
    """
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@contextmanager
def explained_os_errors(path: AnyPath) -> Iterator[None]:
    """Turn an OSError into one that says what could not be written, and the remedy."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno,
            f"The feature store cannot be written in '{path}': {error.strerror or error}."
            f" {'Free space there, or give' if error.errno in _FULL else 'Give'} TRAKCallback another dirpath. What is"
            " written so far is kept, and a rerun goes on from it",
        ) from error


def free_space(path: AnyPath) -> int:
    """Return the free bytes of the disk on which a folder is, or will be; for one in an object store, of the cache."""
    path = local_folder(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free


def check_space(path: AnyPath, size: int) -> None:
    """Raise an OSError if the disk has less than ``size`` bytes free; see `free_space`."""
    free = free_space(path)
    if free < size:
        needed = f"{os.strerror(errno.ENOSPC)}: {size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free"
        with explained_os_errors(local_folder(path)):
            raise OSError(errno.ENOSPC, needed)


def read_json(path: AnyPath, remedy: str = "") -> dict[str, Any]:
    """Read what `write_json` wrote.

    Args:
        path: the file.
        remedy: what to do if it is damaged; by default, to delete its folder.

    Raises:
        Damaged: if it is missing or damaged.
    """
    remedy = remedy or f"Delete the folder '{path.parent}' and featurize again."
    try:
        return reading(path, _json_in)
    except FileNotFoundError as error:
        raise Damaged(path, "it is missing", remedy) from error
    except Damaged as error:
        raise Damaged(path, error.why, remedy) from error
    except (ValueError, RecursionError) as error:  # checksum_of has the limits of json.loads
        raise Damaged(path, str(error), remedy) from error


def _json_in(path: Path) -> dict[str, Any]:
    """Return the JSON object in a local file."""
    with explained_reading(path):
        value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise Damaged(path, "it holds no JSON object")
    if value.pop("checksum", None) != checksum_of(value):
        raise Damaged(path, "its checksum has changed")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum; the file is replaced whole."""
    with atomically(path) as partial:
        partial.write_text(json.dumps({"checksum": checksum_of(value), **value}, indent=1))


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Write a file, or a folder, whole or not at all: write to the yielded path; it replaces ``path`` at the end.

    The content reaches the disk before the name does: after a power cut there is the old file or the new one. A folder
    replaces none that has files.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}{PARTIAL}")  # unique: another process may write the same file
    try:
        yield partial
        to_disk(partial)
        os.replace(partial, path)
        to_disk(path.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
