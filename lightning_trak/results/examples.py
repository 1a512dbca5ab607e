"""What is known of the examples of a data set besides their rows: ids, labels, and whatever a user names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

Value = str | int | float | bool | None
ID, ROW = "id", "row"  # names that no column may have


class Examples:
    """Ids and columns of the examples of a data set, in the order of its rows; immutable.

    Args:
        ids: an id for each row, text or integers; or the number of rows, whose ids then are the row numbers.
        columns: values by name, one for each row: text, numbers, True, False or None. Tensors and arrays are taken,
            too. ``"label"`` and ``"prediction"`` are names that tables and reports know.

    Raises:
        TypeError: if an id or a value has another type.
        ValueError: if a column has another length than ``ids``, or the name ``"id"`` or ``"row"``.

    >>> examples = Examples(["a.png", "b.png"], {"label": ["cat", "dog"]})
    >>> len(examples), examples.ids[1], examples.columns["label"][1], examples.rows_of(["b.png"])
    (2, 'b.png', 'dog', [1])
    >>> list(Examples(3).ids)
    [0, 1, 2]
    """

    def __init__(self, ids: Iterable[Any] | int, columns: Mapping[str, Iterable[Any]] | None = None) -> None:
        self._ids: Sequence[str | int] = range(ids) if isinstance(ids, int) else _checked_ids(ids)
        self._columns = {name: self._checked_column(name, values) for name, values in (columns or {}).items()}

    @property
    def ids(self) -> Sequence[str | int]:
        """The id of each row; the row numbers where nothing else is known."""
        return self._ids

    @property
    def columns(self) -> Mapping[str, Sequence[Value]]:
        """The values of each row, by the name of the column."""
        return MappingProxyType(self._columns)

    @property
    def unknown(self) -> bool:
        """Whether nothing is known but the row numbers."""
        return isinstance(self._ids, range) and not self._columns

    def saved(self) -> dict[str, Any]:
        """Return the arguments of `Examples` that make the same again; JSON can hold them."""
        return {"ids": len(self) if isinstance(self._ids, range) else self._ids, "columns": self._columns}

    def with_columns(self, columns: Mapping[str, Iterable[Any]]) -> Examples:
        """Return the same examples with some columns added or replaced; ``"id"`` replaces the ids.

        >>> Examples(2).with_columns({"id": ["a", "b"], "label": [0, 1]})
        Examples(2 examples, ids 'a' to 'b', columns label)
        """
        ids = _checked_ids(columns[ID]) if ID in columns else self._ids
        if len(ids) != len(self):
            raise ValueError(_wrong_length(ID, len(ids), len(self)))
        return Examples(ids, {**self._columns, **{name: columns[name] for name in columns if name != ID}})

    def rows_of(self, ids: Iterable[str | int]) -> list[int]:
        """Return the row of each id.

        Raises:
            TypeError: if ``ids`` is no list of ids.
            ValueError: if there is no such id, or several rows have it.
        """
        if isinstance(plain(ids), (str, int)):
            raise TypeError(f"ids must be a list of ids, got {ids!r} alone. Pass [{ids!r}].")
        return [self._row_of(one) for one in _checked_ids(ids)]

    def _row_of(self, one: str | int) -> int:
        row = self._rows.get((type(one), one))
        if row is None:
            other = str(one) if isinstance(one, int) else int(one) if one.isdecimal() else None
            near = f"there is {other!r}" if (type(other), other) in self._rows else f"ids are {self._shown_ids()}"
            raise ValueError(f"No example has the id {one!r}; {near}. Text and numbers are different ids.")
        if row < 0:
            same = [place for place, other in enumerate(self._ids) if (type(other), other) == (type(one), one)]
            raise ValueError(
                f"{-row} examples have the id {one!r}, in the rows {', '.join(map(str, same[:5]))}"
                f"{', ...' if len(same) > 5 else ''}. Use their rows, or give them ids that differ:"
                " attribution.with_columns(train={'id': ...}), or targets={'id': ...}."
            )
        return row

    @cached_property
    def _rows(self) -> dict[tuple[type, str | int], int]:
        """The row of each id; of an id of several rows minus their number. 7 and "7" are two ids."""
        rows = {(type(one), one): row for row, one in enumerate(self._ids)}
        if len(rows) < len(self):
            counts = Counter((type(one), one) for one in self._ids)
            rows.update({key: -count for key, count in counts.items() if count > 1})
        return rows

    def _checked_column(self, name: Any, values: Iterable[Any]) -> tuple[Value, ...]:
        if not isinstance(name, str) or not name or name in (ID, ROW):
            raise ValueError(
                f"A column cannot have the name {name!r}: names are text, and neither {ID!r} nor {ROW!r}, which tables"
                " have anyway. Choose another name."
            )
        found = tuple(_checked_value(name, value) for value in _listed(name, values))
        if len(found) != len(self):
            raise ValueError(_wrong_length(name, len(found), len(self)))
        return found

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Examples):
            return NotImplemented
        return tuple(self._ids) == tuple(other._ids) and self._columns == other._columns

    def __repr__(self) -> str:
        columns = f", columns {', '.join(self._columns)}" if self._columns else ""
        return f"Examples({len(self)} examples, ids {self._shown_ids()}{columns})"

    def _shown_ids(self) -> str:
        return f"{self._ids[0]!r} to {self._ids[-1]!r}" if len(self) else "none"


def _checked_ids(ids: Iterable[Any]) -> Sequence[str | int]:
    if isinstance(ids, range) and ids == range(len(ids)):
        return ids
    found = tuple(plain(one) for one in _listed(ID, ids))
    for one in found:
        if type(one) not in (str, int):
            raise TypeError(f"Ids must be text or integers, got {one!r} ({type(one).__name__}).")
    return found


def _listed(name: str, values: Any) -> list[Any]:
    """Return the values of a list, tensor, array or series as a list."""
    found = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(found, (str, bytes, Mapping)) or not isinstance(found, Iterable):
        raise TypeError(f"The column {name!r} must have a value for each row, in order; got {type(found).__name__}.")
    return list(found)


def _checked_value(name: str, value: Any) -> Value:
    found = plain(value)
    if found is not None and not isinstance(found, (str, int, float, bool)):
        raise TypeError(
            f"The column {name!r} has a value of type {type(value).__name__}; expected text, numbers, True, False or"
            " None. Convert it, e.g. with str(value)."
        )
    return found


def plain(value: Any) -> Any:
    """Return a value in Python's own type, where it is text or one number; another value as it is.

    >>> import numpy as np
    >>> plain(np.int64(3)), plain(np.str_("a")), plain([3])
    (3, 'a', [3])
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    if isinstance(value, (int, float)):  # of an enumeration, for example
        return int(value) if isinstance(value, int) else float(value)
    return value


def _wrong_length(name: str, got: int, expected: int) -> str:
    return f"The column {name!r} has {got} values for {expected} examples. Give one value for each, in order."
