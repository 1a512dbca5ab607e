"""Scores as tables: a row for each target and each of its most helpful and most harmful training examples."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_trak.influence import Extremes
from lightning_trak.results.examples import Examples
from lightning_trak.results.stored_scores import StoredScores
from lightning_trak.store.files import atomically

if TYPE_CHECKING:
    from pandas import DataFrame

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # a cell that begins so may be computed
_NUMBERS = ({int}, {float}, {int, float})

Table = Mapping[str, Any]
"""Columns by name, lists or arrays of the same length."""


def long_table(extremes: Extremes, train: Examples, targets: Examples, outputs: Tensor | None, errors: Any) -> Table:
    """Return a row for each target and each training example among its extremes that helps or harms.

    Args:
        extremes: the highest and lowest scores of each target. Of the highest, those above zero help; of the lowest,
            those below zero harm.
        train: what is known of the training examples.
        targets: what is known of the targets.
        outputs: f of the targets, (m,); None where it is unknown.
        errors: the standard errors of all scores, (n, m); None where they are unknown.

    Returns:
        The columns, see `Attribution.to_pandas`.

    >>> from lightning_trak.influence import Ranked
    >>> top = Ranked(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]))
    >>> bottom = Ranked(torch.tensor([[1, 0]]), torch.tensor([[-1.0, 0.25]]))
    >>> table = long_table(Extremes(top, bottom), Examples(["a", "b", "c"]), Examples(1), None, None)
    >>> list(zip(table["side"], table["rank"].tolist(), table["train_id"], table["score"].tolist()))
    [('helpful', 1, 'c', 0.5), ('helpful', 2, 'a', 0.25), ('harmful', 1, 'b', -1.0)]
    """
    top, bottom = extremes.top, extremes.bottom
    k = top.values.shape[1]
    columns, places = torch.cat([top.values > 0, bottom.values < 0], 1).nonzero(as_tuple=True)
    rows = torch.cat([top.indices, bottom.indices], 1)[columns, places]
    values = torch.cat([top.values, bottom.values], 1)[columns, places]
    table: dict[str, Any] = {
        "target_id": _picked(targets.ids, columns),
        "target_row": _array(columns),
        "side": ["helpful" if place < k else "harmful" for place in places.tolist()],
        "rank": _array(places % k + 1),
        "train_id": _picked(train.ids, rows),
        "train_row": _array(rows),
        "score": _array(values),
    }
    if errors is not None:
        found = errors.picked(rows, columns) if isinstance(errors, StoredScores) else errors[rows, columns]
        table["standard_error"] = _array(found)
    if outputs is not None:
        table["target_output"] = _array(outputs[columns])
    for side, examples, chosen in (("target", targets, columns), ("train", train, rows)):
        table |= {f"{side}_{name}": _picked(known, chosen) for name, known in examples.columns.items()}
    return table


def long_frame(table: Table) -> DataFrame:
    """Return a table as a DataFrame of pandas; integers beside None stay integers."""
    pd = imported("pandas")
    return pd.DataFrame(
        {name: pd.Series(values, dtype=object) if None in _kinds(values) else values for name, values in table.items()}
    )


def wide_frame(scores: Any, train: Examples, targets: Examples) -> DataFrame:
    """Return scores, (n, m), as a DataFrame of pandas with ids as index and columns."""
    pd = imported("pandas")
    index, columns = pd.Index(train.ids, name="train_id"), pd.Index(targets.ids, name="target_id")
    shared = isinstance(scores, Tensor)  # writing to the frame must not change the scores
    return pd.DataFrame(np.asarray(scores), index, columns, copy=shared)


def write_csv(path: str | os.PathLike[str], table: Table) -> None:
    """Write a table as CSV, UTF-8; text that a spreadsheet would compute gets an apostrophe in front."""
    with _replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow([_inert(name) for name in table])
        writer.writerows([_inert(value) for value in row] for row in zip(*table.values(), strict=True))


def write_parquet(path: str | os.PathLike[str], table: Table) -> None:
    """Write a table as Parquet; a column of both text and numbers becomes text."""
    pa = imported("pyarrow")
    parquet = imported("pyarrow.parquet")
    arrays = {_encodable(name): pa.array(_of_one_kind(values)) for name, values in table.items()}
    with _replacing(path) as partial:
        parquet.write_table(pa.table(arrays), partial)


def _replacing(path: str | os.PathLike[str]) -> Any:
    """Write a file whole or not at all; its folder is made if it is not there."""
    whole = Path(path)
    whole.parent.mkdir(parents=True, exist_ok=True)
    return atomically(whole)


def imported(name: str) -> Any:
    """Return an optional module; if it is not installed, an error says what needs it, and what does without."""
    try:
        return __import__(name, fromlist=["_"])
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        what = {"pandas": "to_pandas()", "pyarrow": "to_parquet(path)"}[package]
        raise ModuleNotFoundError(
            f"{what} needs {package}, which is not installed: pip install {package}. to_csv(path) works without."
        ) from error


def _picked(values: Sequence[Any], places: Tensor) -> list[Any]:
    return [values[place] for place in places.tolist()]


def _array(numbers: Tensor) -> Any:
    return numbers.cpu().numpy()


def _kinds(values: Sequence[Any]) -> set[Any]:
    """Return the types of values, with None in place of its own."""
    return set() if isinstance(values, np.ndarray) else {None if value is None else type(value) for value in values}


def _of_one_kind(values: Sequence[Any]) -> Sequence[Any]:
    """Return values of one type, which a file format with typed columns can hold."""
    kinds = _kinds(values) - {None}
    large = int in kinds and any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in values)
    if isinstance(values, np.ndarray) or (kinds in ({bool}, *_NUMBERS) and not large):
        return values
    return [None if value is None else _encodable(str(value)) for value in values]


def _inert(value: Any) -> Any:
    """Return a cell of a CSV file that no spreadsheet computes.

    >>> _inert("=1+1"), _inert("-5"), _inert("a-b"), _inert(-5.0)
    ("'=1+1", '-5', 'a-b', -5.0)
    """
    if not isinstance(value, str):
        return value
    text = _encodable(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    return text[1:].replace(".", "", 1).isdecimal() and text.isascii()


def _encodable(text: str) -> str:
    """Return a text that UTF-8 can hold: a file name may have bytes that are none."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
