"""CheckpointEntry: one checkpoint of the feature store, written row by row. NumPy only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

_CRC_BLOCK = 2**24

Array = npt.NDArray[Any]


class CheckpointEntry:
    """One checkpoint of a `FeatureStore`: its weights file, and features that are written row by row.

    Every row is written once; ``written.npy`` says which are, so that a crash loses at most the batch in flight. Only
    a complete entry gives its features away.
    """

    def __init__(self, path: Path, n_train: int) -> None:
        self.path = path
        self.digest = path.name
        self.n_train = n_train
        self.meta = read_json(path / "meta.json")
        self._open: dict[str, Array] = {}

    @property
    def weights_path(self) -> Path:
        """Where the weights are."""
        return self.path / "weights.pt"

    @property
    def complete(self) -> bool:
        """Whether the features of all training examples are there."""
        return "checksums" in self.meta

    def allocate(self, k: int) -> None:
        """Make room on the disk for all features at once, so that a disk too small is known before the work is done."""
        if (self.path / "written.npy").exists():
            return
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "features": ((self.n_train, k), np.float32),
            "loss_grad": ((self.n_train,), np.float32),
            "curvature": ((self.n_train,), np.float32),
            "written": ((self.n_train,), np.bool_),  # last: it is the sign that the others are there
        }
        with explained_os_errors(self.path):
            for name, (shape, dtype) in shapes.items():
                _allocate(self.path / f"{name}.npy", shape, dtype)

    def missing_rows(self) -> npt.NDArray[np.int64]:
        """Return the training examples whose features are still to be written, in order."""
        if not (self.path / "written.npy").exists():
            return np.arange(self.n_train)
        return np.flatnonzero(~self._array("written"))

    def write(self, rows: Sequence[int], features: Array, loss_grad: Array, curvature: Array) -> None:
        """Write the features (r, k), Q (r,) and w (r,) of the training examples ``rows``."""
        written = self._array("written")
        twice = [row for row in rows if written[row]]
        if twice:
            raise ValueError(f"Rows {twice[:10]} of checkpoint {self.digest} are written already.")
        for name, values in (("features", features), ("loss_grad", loss_grad), ("curvature", curvature)):
            self._array(name)[rows] = values
        written[rows] = True

    def finish(self) -> None:
        """Seal the entry once every row is there: bring it to the disk, with checksums that tell later damage."""
        missing = self.missing_rows()
        if len(missing):
            raise ValueError(f"{len(missing)} rows of checkpoint {self.digest} are not written yet.")
        with explained_os_errors(self.path):
            for array in self._open.values():
                array.flush()  # type: ignore[attr-defined]
            self._open.clear()
            checksums = {name: self._checksum(name) for name in ("features", "loss_grad", "curvature")}
            self.meta = {**self.meta, "checksums": checksums}
            write_json(self.path / "meta.json", self.meta)

    def supplement(self, meta: Mapping[str, Any]) -> None:
        """Note what was not known of the checkpoint when it was added."""
        new = {name: value for name, value in meta.items() if value is not None and self.meta.get(name) is None}
        if new:
            self.meta = {**self.meta, **new}
            with explained_os_errors(self.path):
                write_json(self.path / "meta.json", self.meta)

    @property
    def features(self) -> Array:
        """Φ, (n, k), memory-mapped; what is written to it does not reach the file."""
        return self._complete("features")

    @property
    def loss_grad(self) -> Array:
        """Q, (n,)."""
        return self._complete("loss_grad")

    @property
    def curvature(self) -> Array:
        """w, (n,)."""
        return self._complete("curvature")

    def verified(self, name: str) -> VerifiedRows:
        """Return Φ, Q or w, by the name of its property, to be read in order; damage is found out at the end."""
        return VerifiedRows(self._complete(name), self.path / f"{name}.npy", self.meta["checksums"][name])

    def read_sums(self, key: Mapping[str, Any]) -> dict[str, Array] | None:
        """Return what `write_sums` wrote for these features and this key; None if there is nothing, or it is damaged.

        Args:
            key: all that the sums depend on beside the features.
        """
        try:
            with open(self._sums_path(key), "rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, KeyError, EOFError):
            return None
        return arrays if arrays.pop("checksum", None) == _checksum_of(arrays) else None

    def write_sums(self, key: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Keep sums over the train set; see `read_sums`."""
        path = self._sums_path(key)
        with explained_os_errors(self.path), atomically(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays, checksum=_checksum_of(arrays))  # type: ignore[arg-type]

    def _sums_path(self, key: Mapping[str, Any]) -> Path:
        """Name the file by all that the sums depend on."""
        text = json.dumps([key, self.meta["checksums"]], sort_keys=True)
        return self.path / f"sums-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.npz"

    def _complete(self, name: str) -> Array:
        if not self.complete:
            raise ValueError(
                f"Checkpoint {self.digest} has features of {self.n_train - len(self.missing_rows())} of {self.n_train}"
                " training examples. trainer.attribute(...) with a train set computes the rest."
            )
        return self._array(name, mode="c")

    def _array(self, name: str, mode: str = "r+") -> Array:
        if name not in self._open or mode == "c":
            path = self.path / f"{name}.npy"
            try:
                array: Array = np.load(path, mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]
            except (OSError, ValueError, EOFError) as error:
                raise self._damaged(name, str(error)) from error
            if len(array) != self.n_train:
                raise self._damaged(name, f"it has {len(array)} rows, expected {self.n_train}")
            if mode == "c":
                return array
            self._open[name] = array
        return self._open[name]

    def _checksum(self, name: str) -> int:
        crc = 0
        with open(self.path / f"{name}.npy", "rb") as file:
            while block := file.read(_CRC_BLOCK):
                crc = zlib.crc32(block, crc)
        return crc

    def _damaged(self, name: str, why: str) -> ValueError:
        return _damaged(self.path / f"{name}.npy", why)


class VerifiedRows:
    """The rows of an array file, each block read once; a checksum tells at the end whether the file is as written."""

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
            crc = zlib.crc32(np.ascontiguousarray(block).data, crc)
            yield block
        if crc != self._checksum:
            raise _damaged(self._path, "its checksum has changed")

    def read(self) -> Array:
        """Return all rows, or raise as `blocks` does."""
        return np.concatenate(list(self.blocks(max(1, len(self._array)))))


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"'{path}' is damaged: {why}. Delete {path.name}, written.npy and the 'checksums' of meta.json there, or simply"
        f" the folder '{path.parent}', and featurize the checkpoint again."
    )


def _checksum_of(arrays: Mapping[str, Array]) -> int:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data, zlib.crc32(name.encode(), crc))
    return crc


@contextmanager
def explained_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into one that says what could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno,
            f"The feature store cannot be written in '{path}': {error.strerror or error}. Free space there, or give"
            " TRAKCallback another dirpath. Everything written so far is kept, and a rerun goes on from it",
        ) from error


def _allocate(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    """Create an array file of zeros whose blocks are really on the disk: a sparse one would end in SIGBUS when full."""
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
            for first in range(0, size, _CRC_BLOCK):
                file.write(bytes(min(_CRC_BLOCK, size - first)))


def _reserve(descriptor: int, size: int) -> bool:
    """Reserve blocks for a file; return False where the system or the file system cannot."""
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
    """Read an object; a ValueError says what to do if the file is damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{path}' is damaged: {error}. Delete the folder '{path.parent}' and featurize again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' is damaged: it holds no object. Delete the folder '{path.parent}'.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a file at once, so that it is never half-written."""
    with atomically(path) as partial:
        partial.write_text(json.dumps(value, indent=1))


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Write a file at once or not at all: to the path that is yielded, which takes its place at the end."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # another process may write the same
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
