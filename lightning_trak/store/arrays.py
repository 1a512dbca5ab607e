"""Arrays in a file, with checksums that hold at one place of the store only."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lightning_trak.store.files import Damaged, atomically, explained_reading
from lightning_trak.store.remote import AnyPath, reading

Array = npt.NDArray[Any]
_OF_DAMAGE = (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)  # raised on reading


def write_arrays(path: Path, arrays: Mapping[str, Array], place: str, notes: Mapping[str, Any] | None = None) -> None:
    """Write arrays to a safetensors file, whole or not at all.

    Args:
        path: the file.
        arrays: by name.
        place: names what the arrays belong to, e.g. checkpoint and rows. The checksums depend on it, so a file that
            was moved to another place is as good as damaged.
        notes: what else belongs to the arrays; JSON can hold it.
    """
    arrays = {name: np.asarray(array, array.dtype.newbyteorder("="), order="C") for name, array in arrays.items()}
    known = json.dumps(notes or {}, sort_keys=True)
    checksums = {name: _checksum(name, array, place + known) for name, array in arrays.items()}
    content = save(dict(arrays), {"place": place, "notes": known, "checksums": json.dumps(checksums)})
    with atomically(path) as partial:
        partial.write_bytes(content)


def read_arrays(path: AnyPath, place: str, names: Sequence[str] | None = None) -> dict[str, Array]:
    """Return what `write_arrays` wrote at this place: the arrays ``names``, or all.

    Raises:
        FileNotFoundError: if there is no such file.
        Damaged: if it is damaged, or of another place. Nothing is allocated by what a damaged file declares.
    """
    return read_with_notes(path, place, names)[0]


def read_with_notes(
    path: AnyPath, place: str, names: Sequence[str] | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return what `write_arrays` wrote at this place, with the notes; see `read_arrays`."""
    arrays, notes = map_arrays(path, place, names)
    return {name: array.copy() for name, array in arrays.items()}, notes


def map_arrays(
    path: AnyPath, place: str, names: Sequence[str] | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Do what `read_with_notes` does without a copy: arrays are the file's memory, to be copied or used at once."""
    return reading(path, lambda local: _mapped(local, path, place, names))


def _mapped(
    local: Path, path: AnyPath, place: str, names: Sequence[str] | None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return arrays and notes from the local file that has the content of ``path``."""
    try:
        with explained_reading(local), open(local, "rb"):
            pass  # safetensors calls a file missing, whatever goes wrong in opening it
        with safe_open(local, "pt") as file:  # maps the file, while "np" would copy it
            metadata = file.metadata()
            checksums = json.loads(metadata["checksums"])
            arrays = {name: file.get_tensor(name).numpy() for name in (checksums if names is None else names)}
        for name, array in arrays.items():
            if checksums[name] != _checksum(name, array, place + metadata["notes"]):
                other = metadata["place"] != place
                raise Damaged(path, "it belongs elsewhere" if other else f"the checksum of {name!r} has changed")
        return arrays, json.loads(metadata["notes"])
    except Damaged:
        raise
    except _OF_DAMAGE as error:
        raise Damaged(path, f"{type(error).__name__}: {error}") from error


def verified_place(path: Path) -> str:
    """Return the place that `write_arrays` was given for a file, after comparing all checksums with it.

    For files whose place only their writers know: the file is whole, but may lie elsewhere.

    Raises:
        FileNotFoundError: if there is no such file.
        Damaged: if it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            place: str = file.metadata()["place"]
    except _OF_DAMAGE as error:
        raise Damaged(path, f"{type(error).__name__}: {error}") from error
    map_arrays(path, place)
    return place


def _checksum(name: str, array: Array, place: str) -> int:
    """Return the CRC-32 of an array, of what it is called, and of where it belongs."""
    start = zlib.crc32(f"{place}|{name}|{array.dtype.str}|{array.shape}".encode())
    return zlib.crc32(array.reshape(-1).view(np.uint8).data, start)
