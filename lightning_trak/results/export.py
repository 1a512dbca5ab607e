"""Training examples in a folder that other tools open: a table, and their images as files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lightning_trak.isolation.random_states import kept_random_states
from lightning_trak.results.kinds import Described, Image, Part, Series, Table, Text, Tokens, described
from lightning_trak.results.reading import check_data_set, read
from lightning_trak.results.report.png import png, thumbnail
from lightning_trak.results.tables import write_csv
from lightning_trak.store.files import atomically
from lightning_trak.store.remote import RemotePath, path_of, writable

TABLE, FILE = "metadata.csv", "file_name"  # names of the format ImageFolder of Hugging Face datasets
_IMAGES, _IMAGE, _LABEL = "images", "image", "label"
_PATHS = (FILE, f"{FILE}s")  # columns whose names end so are paths of images; the first is read as the column "image"


def write_export(
    path: str | os.PathLike[str] | RemotePath, rows: Sequence[Mapping[str, Any]], data: Any, size: int
) -> Path:
    """Write a table with a row for each example, and its images; the folder appears when it is whole.

    Args:
        path: the folder.
        rows: what is known of each example; ``"row"`` is its row in the data set. Labels that are None are completed.
        data: the data set.
        size: how many examples the data set must have.

    Returns:
        The path of the folder.

    Raises:
        FileExistsError: if there is something at ``path``, and it is no empty folder.
        TypeError, ValueError: if ``data`` is no data set of that size.
    """
    folder = writable(path_of(path))
    check_data_set("train", data, size)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' exists and is no empty folder. Choose another path, or delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomically(folder) as partial, kept_random_states():  # data sets may augment at random
        partial.mkdir()
        shown = tqdm(rows, desc="Exporting", unit=" examples", disable=None, leave=False, dynamic_ncols=True)
        table = [_exported(partial, place, row, described(read(data, row["row"]))) for place, row in enumerate(shown)]
        names = dict.fromkeys(name for row in table for name in row)
        write_csv(partial / TABLE, {name: [row.get(name) for row in table] for name in names})
    return folder


def _exported(folder: Path, place: int, known: Mapping[str, Any], example: Described) -> dict[str, Any]:
    """Write the images of an example; return its row of the table.

    Files are named for the place of the example and of the image, so nothing in the data can choose a name.
    """
    row: dict[str, Any] = {}
    if example.image is not None:
        row[FILE] = _written(folder, f"{place:07d}", example.image)
    for name, value in known.items():
        row[_free(name, row)] = example.label if name == _LABEL and value is None else value
    for number, (name, part) in enumerate(example.parts):
        if not isinstance(part, Image):
            for column, value in _columns(name, part):
                row[_free(column, row)] = value
        elif part is not example.image:
            unnamed = not name or f"{name}_{FILE}" in row
            column = f"{name or _IMAGE}_{number}" if unnamed else name
            row[f"{column}_{FILE}"] = _written(folder, f"{place:07d}-{number}", part)
    return row


def _written(folder: Path, name: str, image: Image) -> str:
    """Write an image in its own size; return its path within the folder."""
    file = f"{_IMAGES}/{name}.png"
    (folder / _IMAGES).mkdir(exist_ok=True)
    (folder / file).write_bytes(png(thumbnail(image, max(image.pixels.shape[:2]))))
    return file


def _columns(name: str, part: Part) -> Iterator[tuple[str, Any]]:
    """Yield what a part adds to the table: names of columns, and values. What cannot be shown adds nothing."""
    if isinstance(part, Table):
        yield from ((f"{name}.{column}" if name else column, value) for column, value in part.values.items())
    elif isinstance(part, Text):
        yield name or "text", part.text
    elif isinstance(part, Tokens):
        yield name or "tokens", " ".join(part.tokens)
    elif isinstance(part, Series):
        channels = [[float(f"{value:.6g}") for value in channel] for channel in part.values.T.astype(np.float64)]
        yield name or "series", json.dumps(channels[0] if len(channels) == 1 else channels)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Return a name that no other column has, and that no reader takes for an image.

    >>> _free("loss", {"loss": 1, "loss_2": 1}), _free("age", {"loss": 1}), _free("my_file_name", {})
    ('loss_3', 'age', 'my_file_name_2')
    """
    number, free = 1, name
    while free in taken or free == _IMAGE or free.endswith(_PATHS):
        number, free = number + 1, f"{name}_{number + 1}"
    return free
