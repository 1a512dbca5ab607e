"""An attribution on disk: an index with checksums, and an array file for each part of it.

The index names the arrays and is replaced in one step. So there is always one whole attribution, the old or the new.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from lightning_trak.store.files import atomically, checksum_of_file, read_json, write_json

_INDEX = "attribution.json"
_LEFT = re.compile(r"(\w+-[0-9a-f]{8}\.npy|attribution\.json)(\.[0-9a-f]{32}\.partial)?")


def write_saved(folder: Path, info: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> None:
    """Write an attribution into a folder; whatever else is in the folder stays.

    Raises:
        FileExistsError: if the folder exists, is not empty, and has no saved attribution.
    """
    if not _is_own(folder):
        raise FileExistsError(f"'{folder}' exists and is no saved attribution. Choose another path.")
    folder.mkdir(parents=True, exist_ok=True)
    outdated, token, files = _files_of(folder), uuid4().hex[:8], {}
    named = {f"{name}-{token}.npy": (name, array) for name, array in arrays.items()}
    try:  # new names: the earlier attribution is whole until the index changes
        for file, (name, array) in named.items():
            with atomically(folder / file) as partial, open(partial, "wb") as opened:
                np.save(opened, array.numpy(), allow_pickle=False)
            files[name] = {"file": file, "checksum": checksum_of_file(folder / file)}
        write_json(folder / _INDEX, {"info": dict(info), "files": files})
    except BaseException:
        outdated = list(named)
        raise
    finally:
        for file in outdated:
            (folder / file).unlink(missing_ok=True)


def check_saved(folder: Path) -> None:
    """Raise a FileNotFoundError if a folder has no attribution."""
    if not (folder / _INDEX).is_file():
        raise FileNotFoundError(
            f"There is no saved attribution in '{folder}' (no {_INDEX}). Compute it again, and save it there."
        )


def read_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the info and the arrays that `write_saved` wrote.

    Raises:
        OSError, ValueError, TypeError, KeyError, EOFError: if a file is missing or damaged.
    """
    index = read_json(folder / _INDEX, "Compute it again.")
    return index["info"], {name: _load(folder, **file) for name, file in index["files"].items()}


def _is_own(folder: Path) -> bool:
    """Say whether a folder may become a saved attribution: it is one, or has nothing but what a killed process left."""
    if not folder.exists() or (folder / _INDEX).is_file():
        return True
    return folder.is_dir() and all(_LEFT.fullmatch(path.name) for path in folder.iterdir())


def _files_of(folder: Path) -> list[str]:
    """Return the names of the arrays of an earlier attribution; none if its index cannot be read."""
    try:
        index = read_json(folder / _INDEX)
        return [Path(entry["file"]).name for entry in index["files"].values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _load(folder: Path, file: str, checksum: int) -> Tensor:
    """Read an array, whose checksum is compared before anything is allocated by what its header declares."""
    path = folder / Path(file).name
    if checksum_of_file(path) != checksum:
        raise ValueError(f"the checksum of {path.name} has changed")
    return torch.from_numpy(np.load(path, allow_pickle=False))
