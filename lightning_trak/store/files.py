"""Files of the store: written whole or not at all, and verified while they are read."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

CRC_BLOCK = 2**24

Array = npt.NDArray[Any]


class VerifiedRows:
    """The rows of an array file. Each block is read once, and a checksum at the end shows whether the file changed."""

    def __init__(self, array: Array, path: Path, checksum: int) -> None:
        self._array, self._path, self._checksum = array, path, checksum

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, k)."""
        return self._array.shape

    def blocks(self, size: int) -> Iterator[Array]:
        """Yield all rows in order, ``size`` at a time.

        Raises:
            ValueError: after the last block, if the file is damaged.
        """
        with open(self._path, "rb") as file:
            crc = zlib.crc32(file.read(os.path.getsize(self._path) - self._array.nbytes))
        for start in range(0, len(self._array), size):
            block = self._array[start : start + size]
            crc = zlib.crc32(np.ascontiguousarray(block).view(np.uint8).data, crc)
            yield block
        if crc != self._checksum:
            raise damaged(self._path, "its checksum has changed")

    def read(self) -> Array:
        """Return all rows, or raise as `blocks` does."""
        return np.concatenate(list(self.blocks(max(1, len(self._array)))))


def damaged(path: Path, why: str) -> ValueError:
    """Return an error that says what is wrong with a file, and the remedy."""
    return ValueError(
        f"'{path}' is damaged: {why}. Delete {path.name}, written.npy and the 'checksums' of meta.json there, or simply"
        f" the folder '{path.parent}', and featurize the checkpoint again."
    )


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum_of_file(path: Path) -> int:
    """Return the CRC-32 of a file, which is read block by block."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(CRC_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def checksum_of(arrays: Mapping[str, Array]) -> int:
    """Return the CRC-32 of arrays and their names."""
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data, zlib.crc32(name.encode(), crc))
    return crc


@contextmanager
def explained_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into one that says what could not be written, and the remedy."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno,
            f"The feature store cannot be written in '{path}': {error.strerror or error}. Free space there, or give"
            " TRAKCallback another dirpath. What is written so far is kept, and a rerun goes on from it",
        ) from error


def allocate(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    """Create an array file of zeros with all its disk space reserved: in a sparse file, a full disk ends in SIGBUS."""
    with atomically(path) as partial, open(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file,
            {
                "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                "fortran_order": False,
                "shape": shape,
            },
        )
        start, size = file.tell(), int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not _reserve(file.fileno(), start + size):
            for first in range(0, size, CRC_BLOCK):
                file.write(bytes(min(CRC_BLOCK, size - first)))


def _reserve(descriptor: int, size: int) -> bool:
    """Reserve disk space for a file; return False where the system or the file system cannot."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:
        return False
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file is damaged; it says the remedy.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{path}' is damaged: {error}. Delete the folder '{path.parent}' and featurize again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' is damaged: it holds no JSON object. Delete the folder '{path.parent}'.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object; the file is replaced whole."""
    with atomically(path) as partial:
        partial.write_text(json.dumps(value, indent=1))


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: write to the yielded path; it replaces ``path`` at the end.

    The content reaches the disk before the name does: after a power cut there is the old file or the new one.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # unique: another process may write the same file
    try:
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)
