"""CheckpointEntry: one checkpoint of the feature store, written row by row. NumPy only."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_trak.store.files import (
    CRC_BLOCK,
    VerifiedRows,
    allocate,
    atomically,
    checksum_of,
    damaged,
    explained_os_errors,
    read_json,
    write_json,
)

Array = npt.NDArray[Any]


class CheckpointEntry:
    """One checkpoint of a `FeatureStore`: its weights file, and features that are written row by row.

    Every row is written once. ``written.npy`` says which rows are there, so a crash loses at most the current batch.
    Features can be read only when all are there.
    """

    def __init__(self, path: Path, n_train: int) -> None:
        self.path = path
        self.digest = path.name
        self.n_train = n_train
        self.meta = read_json(path / "meta.json")
        self._open: dict[str, Array] = {}

    @property
    def weights_path(self) -> Path:
        """The path of the weights file."""
        return self.path / "weights.pt"

    @property
    def complete(self) -> bool:
        """Whether the features of all training examples are there."""
        return "checksums" in self.meta

    def allocate(self, k: int, record: np.dtype[Any] | None = None) -> None:
        """Reserve disk space for all features at once, so that a disk too small is an error before any work is done."""
        if (self.path / "written.npy").exists():
            return
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "features": ((self.n_train, k), np.float32) if record is None else ((self.n_train,), record),
            "loss_grad": ((self.n_train,), np.float32),
            "curvature": ((self.n_train,), np.float32),
            "written": ((self.n_train,), np.bool_),  # last: its presence means that the others exist
        }
        with explained_os_errors(self.path):
            for name, (shape, dtype) in shapes.items():
                allocate(self.path / f"{name}.npy", shape, dtype)

    def missing_rows(self) -> npt.NDArray[np.int64]:
        """Return the rows of the training examples whose features are not written yet, in order."""
        if not (self.path / "written.npy").exists():
            return np.arange(self.n_train)
        return np.flatnonzero(~self._array("written"))

    def written_rows(self) -> npt.NDArray[np.int64]:
        """Return the training examples whose features are there, in order."""
        return np.setdiff1d(np.arange(self.n_train), self.missing_rows())

    def rows(self, name: str, rows: Sequence[int]) -> Array:
        """Return some rows that are written, also of an entry that is not complete.

        Args:
            name: ``"features"``, ``"loss_grad"`` or ``"curvature"``.
            rows: which.
        """
        return self._array(name, mode="c")[list(rows)]

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
        """Complete the entry once all rows are written: flush them, and store checksums that show later damage."""
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
        """Add to ``meta`` what was unknown when the checkpoint was added; known values stay."""
        new = {name: value for name, value in meta.items() if value is not None and self.meta.get(name) is None}
        if new:
            self.meta = {**self.meta, **new}
            with explained_os_errors(self.path):
                write_json(self.path / "meta.json", self.meta)

    @property
    def features(self) -> Array:
        """Φ, (n, k), memory-mapped copy-on-write: writing to it does not change the file."""
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
        """Return Φ, Q or w, by property name, to read in order; damage raises an error after the last row."""
        return VerifiedRows(self._complete(name), self.path / f"{name}.npy", self.meta["checksums"][name])

    def read_sums(self, key: Mapping[str, Any]) -> dict[str, Array] | None:
        """Return what `write_sums` wrote for these features and this key; None if it is missing or damaged.

        Args:
            key: all that the sums depend on, apart from the features.
        """
        try:
            with open(self._sums_path(key), "rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except Exception:  # There is none, or it is damaged, of which zip files tell in many ways.
            return None
        return arrays if arrays.pop("checksum", None) == checksum_of(arrays) else None

    def write_sums(self, key: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Store sums over the train set; see `read_sums`."""
        path = self._sums_path(key)
        with explained_os_errors(self.path), atomically(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays, checksum=checksum_of(arrays))  # type: ignore[arg-type]

    def _sums_path(self, key: Mapping[str, Any]) -> Path:
        """Return the path of the sums: its name is a digest of all that they depend on."""
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
            while block := file.read(CRC_BLOCK):
                crc = zlib.crc32(block, crc)
        return crc

    def _damaged(self, name: str, why: str) -> ValueError:
        return damaged(self.path / f"{name}.npy", why)
