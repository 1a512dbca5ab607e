"""Training examples that a user should look at: a table with any columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_trak.results.examples import Examples
from lightning_trak.results.kinds import Scalar
from lightning_trak.results.report.data_set import DataSet
from lightning_trak.results.values import value_text

_MOST = 500  # suspects that are shown
_ROW, _ID = "row", "id"
_SELF_INFLUENCE = "self-influence"
_WRONG = "wrong"


class ListedSuspects:
    """Training examples, the most suspicious first.

    Args:
        given: what was passed as ``suspects``: an object with ``to_rows()``, a sequence of mappings, or self-influence,
            (n,), a tensor. A mapping names its training example by "row" or "id"; its other values are shown under
            their names, "wrong" first; names without any value are left out.
        train: the n training examples.

    Raises:
        TypeError: if it is none of these.
        ValueError: if a mapping names no training example, or there are not n numbers.

    Attributes:
        rows: the rows in the train set of those that are shown.
        count: how many there are.

    >>> import torch
    >>> ListedSuspects(torch.tensor([0.1, 0.7, 0.2]), Examples(3)).rows
    [1, 2, 0]
    """

    def __init__(self, given: Any, train: Examples) -> None:
        found = _of_tensor(given, train) if isinstance(given, Tensor) else _of_rows(given)
        self.count = len(found)
        self._shown = found[:_MOST]
        self.rows = [_row(suspect, train) for suspect in self._shown]

    def content(self, train: DataSet) -> dict[str, Any]:
        """Return what is shown: places among the training examples, and columns with numbers to sort by."""
        given = dict.fromkeys(name for suspect in self._shown for name in suspect if name not in (_ROW, _ID))
        known = [name for name in given if any(suspect.get(name) is not None for suspect in self._shown)]
        names = sorted(known, key=lambda name: name != _WRONG)  # what is wrong comes first
        return {
            "count": self.count,
            "self_influence": _SELF_INFLUENCE in names,
            "places": [train.shown(row) for row in self.rows],
            "columns": [_column(str(name), [suspect.get(name) for suspect in self._shown]) for name in names],
        }


def _of_tensor(values: Tensor, train: Examples) -> list[dict[str, Any]]:
    """Return the rows with the highest self-influence."""
    if tuple(values.shape) != (len(train),):
        raise ValueError(
            f"suspects as a tensor must be the self-influence of the train set, ({len(train)},), as"
            f" trainer.attribute_self() returns it; got {tuple(values.shape)}."
        )
    numbers = values.double().cpu()
    if not bool(numbers.isfinite().all()):
        raise ValueError("suspects has numbers that are not finite, so they cannot be ranked. Compute them again.")
    order = numbers.argsort(descending=True, stable=True).tolist()
    return [{_ROW: row, _SELF_INFLUENCE: numbers[row].item()} for row in order]


def _of_rows(given: Any) -> list[Mapping[str, Any]]:
    rows = given.to_rows() if hasattr(given, "to_rows") else given
    if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, Mapping) for row in rows):
        return list(rows)
    raise TypeError(
        "suspects must be an object with to_rows(), a sequence of mappings with a 'row' or 'id' each, or a tensor of"
        f" self-influence, (n,); got {type(given).__name__}."
    )


def _row(suspect: Mapping[str, Any], train: Examples) -> int:
    """Return the row in the train set that a mapping names."""
    if _ROW in suspect:
        row = int(suspect[_ROW])
        if not 0 <= row < len(train):
            raise ValueError(f"suspects names the row {row}; rows of the train set are 0 to {len(train) - 1}.")
        return row
    if _ID in suspect:
        return train.rows_of([suspect[_ID]])[0]
    raise ValueError(
        f"suspects has a mapping without 'row' and 'id': it has {', '.join(map(repr, suspect)) or 'nothing'}. Name the"
        " training example."
    )


def _column(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return a column as texts, and as numbers where all its values are."""
    scalars: list[Scalar] = [value.item() if hasattr(value, "item") else value for value in values]
    known = [value for value in scalars if value is not None]
    numeric = bool(known) and all(isinstance(value, (int, float)) and math.isfinite(value) for value in known)
    return {
        "name": value_text(name.replace("_", " ")),
        "texts": [_text(value) for value in scalars],
        "numbers": scalars if numeric else None,
    }


def _text(value: Any) -> str:
    """Return a value as text; several values with commas between them."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return value_text(value if isinstance(value, (str, int, float, bool, type(None))) else str(value))
