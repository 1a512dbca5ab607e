"""An attribution on disk: an index with checksums, and a file for each part of it.

The index names the files and is replaced in one step. So there is always one whole attribution, the old or the new.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from lightning_trak.results.stored_scores import StoredScores
from lightning_trak.store.chunks import Chunks
from lightning_trak.store.files import atomically, checksum_of_file, read_json, write_json
from lightning_trak.store.remote import AnyPath, RemotePath, reading

INDEX = "attribution.json"
PART = re.compile(r"\w+-[0-9a-f]{8}(\.npy|\.json)?")
_LEFT = re.compile(rf"({PART.pattern}|{re.escape(INDEX)})(\.[0-9a-f]{{32}}\.partial)?")


class Saved(NamedTuple):
    """What an attribution is made of, by the names of the parts.

    Attributes:
        info: how scores were computed.
        arrays: what is in memory.
        stored: what is on disk.
        tables: what is known of training examples and targets; JSON can hold it.
    """

    info: Mapping[str, Any]
    arrays: Mapping[str, Tensor]
    stored: Mapping[str, StoredScores]
    tables: Mapping[str, Mapping[str, Any]]


def write_saved(folder: Path, saved: Saved) -> None:
    """Write an attribution into a folder; whatever else is in the folder stays.

    Raises:
        FileExistsError: if the folder exists, is not empty, and has no saved attribution.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    token, former = uuid4().hex[:8], _named(folder)
    endings = ((saved.arrays, ".npy"), (saved.stored, ""), (saved.tables, ".json"))
    own = {f"{name}-{token}{ending}" for parts, ending in endings for name in parts}
    try:  # new names: the earlier attribution is whole until the index changes
        write_json(folder / INDEX, {"info": dict(saved.info), **_write_parts(folder, token, saved)})
    finally:
        for name in (own | former) - _named(folder):
            _delete(folder / name)


def _write_parts(folder: Path, token: str, saved: Saved) -> dict[str, Any]:
    """Write all parts under new names; return what the index says of them."""
    files, chunks, tables = {}, {}, {}
    for name, array in saved.arrays.items():
        path = folder / f"{name}-{token}.npy"
        with atomically(path) as partial, open(partial, "wb") as opened:
            np.save(opened, array.numpy(), allow_pickle=False)
        files[name] = {"file": path.name, "checksum": checksum_of_file(path)}
    for name, scores in saved.stored.items():
        copy = scores.chunks.copied(folder / f"{name}-{token}")
        own = {"place": copy.place, "n": copy.n, "size": copy.size, "m": scores.shape[1], "factor": scores.factor}
        chunks[name] = {"folder": copy.folder.name, **own}
    for name, table in saved.tables.items():
        tables[name] = f"{name}-{token}.json"
        write_json(folder / tables[name], table)
    return {"files": files, "chunks": chunks, "tables": tables}


def check_free(folder: AnyPath) -> None:
    """Raise a FileExistsError if a folder holds other things than an attribution: nothing is saved there."""
    if folder.exists() and not _is_own(folder):
        raise FileExistsError(f"'{folder}' exists and is no saved attribution. Choose another path.")


def check_saved(folder: AnyPath) -> None:
    """Raise a FileNotFoundError if a folder has no attribution."""
    if not (folder / INDEX).is_file():
        remedy = "copy the folder there" if isinstance(folder, RemotePath) else "save it there"
        raise FileNotFoundError(
            f"There is no saved attribution in '{folder}' (no {INDEX}). Compute it again, and {remedy}."
        )


def read_saved(folder: AnyPath) -> Saved:
    """Return what `write_saved` wrote.

    Raises:
        OSError, ValueError, TypeError, KeyError, EOFError: if a file is missing or damaged.
    """
    index = read_json(folder / INDEX, "Compute it again.")
    try:
        return _read_parts(folder, index)
    except (OSError, ValueError):
        again = read_json(folder / INDEX, "Compute it again.")
        if again == index:
            raise
        return _read_parts(folder, again)  # another process has saved a new one in the meantime


def _read_parts(folder: AnyPath, index: Mapping[str, Any]) -> Saved:
    """Return the parts that an index names."""
    stored = {name: _stored(folder, **entry) for name, entry in index["chunks"].items()}
    arrays = {name: _load(folder, **file) for name, file in index["files"].items()}
    tables = {name: read_json(folder / Path(file).name, "Compute it again.") for name, file in _tables(index).items()}
    return Saved(index["info"], arrays, stored, tables)


def _tables(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of tables by name; an attribution of an earlier version has none."""
    return dict(index.get("tables", {}))


def _is_own(folder: AnyPath) -> bool:
    """Say whether a folder is a saved attribution, or has nothing but what a killed process left."""
    if (folder / INDEX).is_file():
        return True
    return folder.is_dir() and all(_LEFT.fullmatch(path.name) for path in folder.iterdir())


def parts_of(index: Mapping[str, Any]) -> set[str]:
    """Return the names of the files and folders that an index names."""
    arrays = {entry["file"] for entry in index["files"].values()}
    return arrays | {entry["folder"] for entry in index["chunks"].values()} | set(_tables(index).values())


def _named(folder: Path) -> set[str]:
    """Return the parts that the index names; none if there is none, or if it is damaged."""
    try:
        parts = parts_of(read_json(folder / INDEX))
    except (ValueError, TypeError, LookupError, AttributeError):
        return set()
    return {name for name in parts if PART.fullmatch(name)}  # no index makes us delete other files


def _delete(path: Path) -> None:
    """Delete a file, or a folder; what a symbolic link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _stored(root: AnyPath, folder: str, place: str, n: int, size: int, m: int, factor: float) -> StoredScores:
    """Return scores on disk, of which all chunks are there; each is verified when it is read."""
    chunks = Chunks(root / Path(folder).name, place, n, size)
    if not chunks.complete:
        raise ValueError(f"of the scores in {folder}, some are missing")
    return StoredScores(chunks, m, factor)


def _load(folder: AnyPath, file: str, checksum: int) -> Tensor:
    """Read an array, whose checksum is compared before anything is allocated by what its header declares."""
    path = folder / Path(file).name

    def read(local: Path) -> Tensor:
        if checksum_of_file(local) != checksum:
            raise ValueError(f"the checksum of {path.name} has changed")
        return torch.from_numpy(np.array(np.load(local, mmap_mode="r", allow_pickle=False)))

    return reading(path, read)
