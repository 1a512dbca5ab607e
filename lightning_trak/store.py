"""FeatureStore: the directory of checkpoints, their features, and scores. NumPy only."""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 1
_CRC_BLOCK = 2**24

Array = npt.NDArray[Any]


class FeatureStore:
    """A directory that holds, for every checkpoint, its weights and the features of all training examples.

    ::

        <dirpath>/manifest.json                     format version, n_train, projection, parameters, data fingerprint
        <dirpath>/checkpoints/<digest>/weights.pt   the weights
                                       features.npy loss_grad.npy curvature.npy written.npy meta.json
        <dirpath>/scores/<name>/...

    A checkpoint is named by the digest of its weights, so the same weights twice are one entry. All entries share one
    manifest; what does not fit it is refused.

    Args:
        dirpath: the directory of an existing store; `FeatureStore.create` makes one.

    Raises:
        FileNotFoundError: if there is no store.
        ValueError: if its manifest is damaged or of another format version.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore.create(folder, {"n_train": 2})
    ...     entry = store.add("abc", {"epoch": 0})
    ...     entry.allocate(k=3)
    ...     entry.write([1], np.ones((1, 3)), np.ones(1), np.ones(1))
    ...     store.digests, entry.missing_rows().tolist(), entry.complete
    (['abc'], [0], False)
    """

    def __init__(self, dirpath: str | os.PathLike[str]) -> None:
        self.dirpath = Path(dirpath)
        path = self.dirpath / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no feature store in '{dirpath}' (no manifest.json). Train with TRAKCallback('{dirpath}')"
                " first, or pass checkpoints with ckpt_path=..."
            )
        self.manifest = _read_json(path)
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"The store '{dirpath}' has format_version={version!r}, this version of lightning_trak reads"
                f" {FORMAT_VERSION}. Use another dirpath."
            )

    @classmethod
    def create(cls, dirpath: str | os.PathLike[str], manifest: Mapping[str, Any]) -> FeatureStore:
        """Open the store in ``dirpath``, made with ``manifest`` if it is not there yet.

        Raises:
            ValueError: if it was made with another manifest; the field, both values and the remedy are named.
            OSError: if the directory cannot be written.
        """
        path = Path(dirpath)
        with explained_os_errors(path):
            if not (path / "manifest.json").exists():
                (path / "checkpoints").mkdir(parents=True, exist_ok=True)
                _write_json(path / "manifest.json", {"format_version": FORMAT_VERSION, **manifest})
        store = cls(path)
        store.check(manifest)
        return store

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raise a ValueError that names the first field in which ``manifest`` differs from the store's own."""
        for name, value in json.loads(json.dumps(manifest)).items():
            given, stored = _flat({name: value}), _flat({name: self.manifest.get(name)})
            for field in [*stored, *(field for field in given if field not in stored)]:
                if stored.get(field) != given.get(field):
                    own, here = _short(stored.get(field)), _short(given.get(field))
                    raise ValueError(
                        f"The store '{self.dirpath}' was made with {field}={own}, but here {field}={here}: features of"
                        " the two cannot be mixed. Use another dirpath for TRAKCallback, restore the former"
                        f" {field}, or delete the store to start anew."
                    )

            if list(_flat({name: value})) != list(_flat({name: self.manifest.get(name)})):
                raise ValueError(
                    f"The store '{self.dirpath}' was made with the {name} in another order than here:"
                    f" {_short(list(self.manifest[name]))} against {_short(list(value))}. Use another dirpath."
                )

    @property
    def n_train(self) -> int:
        """The number of training examples."""
        return int(self.manifest["n_train"])

    @property
    def digests(self) -> list[str]:
        """The checkpoints, in the order in which they came."""
        found = [(entry.meta.get("created", 0), entry.digest) for entry in self]
        return [digest for _, digest in sorted(found)]

    def __iter__(self) -> Iterator[CheckpointEntry]:
        folder = self.dirpath / "checkpoints"
        for path in sorted(folder.iterdir() if folder.is_dir() else []):
            if (path / "meta.json").is_file():
                yield CheckpointEntry(path, self.n_train)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, digest: str) -> bool:
        return (self.dirpath / "checkpoints" / digest / "meta.json").is_file()

    def __getitem__(self, digest: str) -> CheckpointEntry:
        if digest not in self:
            raise KeyError(f"The store '{self.dirpath}' has no checkpoint {digest}; it has {self.digests}.")
        return CheckpointEntry(self.dirpath / "checkpoints" / digest, self.n_train)

    def folder(self, digest: str) -> Path:
        """Return the folder of a checkpoint, made if it is not there; weights go in before the entry is added."""
        path = self.dirpath / "checkpoints" / digest
        with explained_os_errors(self.dirpath):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, digest: str, meta: Mapping[str, Any]) -> CheckpointEntry:
        """Add a checkpoint, whose features are still to be written; one that is there already is returned as it is."""
        if digest not in self:
            path = self.folder(digest)
            with explained_os_errors(self.dirpath):
                _write_json(path / "meta.json", {"digest": digest, "created": time.time_ns(), **meta})
        return self[digest]

    def discard(self, digest: str) -> None:
        """Delete a checkpoint and its features."""
        shutil.rmtree(self.dirpath / "checkpoints" / digest, ignore_errors=True)

    def scores_dir(self, name: str) -> Path:
        """Return the directory of the scores saved under ``name``."""
        if not name or name != Path(name).name or name in (".", ".."):
            raise ValueError(f"name must be usable as a folder name, got {name!r}.")
        return self.dirpath / "scores" / name

    def __repr__(self) -> str:
        complete = sum(entry.complete for entry in self)
        return (
            f"FeatureStore('{self.dirpath}', n_train={self.n_train}, checkpoints={len(self)}, featurized={complete},"
            f" projection={_short(self.manifest.get('projection'))})"
        )


class CheckpointEntry:
    """One checkpoint of a `FeatureStore`: its weights file, and features that are written row by row.

    Every row is written once; ``written.npy`` says which are, so that a crash loses at most the batch in flight. Only
    a complete entry gives its features away.
    """

    def __init__(self, path: Path, n_train: int) -> None:
        self.path = path
        self.digest = path.name
        self.n_train = n_train
        self.meta = _read_json(path / "meta.json")
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
            _write_json(self.path / "meta.json", self.meta)

    def verify(self) -> None:
        """Raise a ValueError if a file of a complete entry is not what was written."""
        for name, expected in self.meta.get("checksums", {}).items():
            try:
                found = self._checksum(name)
            except OSError as error:
                raise self._damaged(name, str(error)) from error
            if found != expected:
                raise self._damaged(name, "its checksum has changed")

    @property
    def features(self) -> Array:
        """Φ, (n, k), memory-mapped and read-only."""
        return self._complete("features")

    @property
    def loss_grad(self) -> Array:
        """Q, (n,)."""
        return self._complete("loss_grad")

    @property
    def curvature(self) -> Array:
        """w, (n,)."""
        return self._complete("curvature")

    def _complete(self, name: str) -> Array:
        if not self.complete:
            raise ValueError(
                f"Checkpoint {self.digest} has features of {self.n_train - len(self.missing_rows())} of {self.n_train}"
                " training examples. trainer.attribute(...) with a train set computes the rest."
            )
        return self._array(name, mode="r")

    def _array(self, name: str, mode: str = "r+") -> Array:
        if name not in self._open or mode == "r":
            path = self.path / f"{name}.npy"
            try:
                array: Array = np.load(path, mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]
            except (OSError, ValueError, EOFError) as error:
                raise self._damaged(name, str(error)) from error
            if len(array) != self.n_train:
                raise self._damaged(name, f"it has {len(array)} rows, expected {self.n_train}")
            if mode == "r":
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
        return ValueError(
            f"'{self.path / name}.npy' is damaged: {why}. Delete {name}.npy, written.npy and the 'checksums' of"
            f" meta.json there, or simply the folder '{self.path}', and featurize the checkpoint again."
        )


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
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file,
                {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                    "fortran_order": False,
                    "shape": shape,
                },
            )
            start, size = file.tell(), int(np.prod(shape)) * np.dtype(dtype).itemsize
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, start + size)
            else:
                for first in range(0, size, _CRC_BLOCK):
                    file.write(bytes(min(_CRC_BLOCK, size - first)))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{path}' is damaged: {error}. Delete the folder '{path.parent}' and featurize again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' is damaged: it holds no object. Delete the folder '{path.parent}'.")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a file at once, so that it is never half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the leaves of nested objects by their path: ``projection.seed``."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {prefix + name: item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:100]} ... {text[-50:]}"
