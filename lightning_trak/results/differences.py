"""In which columns rows of a table differ most."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from lightning_trak.results.kinds import Scalar
from lightning_trak.results.values import cut, value_text

_MOST = 3  # columns in which an example differs most from the target


class Differences:
    """Rows of tables, and how they differ.

    Attributes:
        tables: the names of the columns of every kind of table, with its number.

    >>> rows = Differences()
    >>> rows.add(0, ["age", "job"], [20, "clerk"]), rows.add(1, ["age", "job"], [30, "clerk"])
    (0, 0)
    >>> rows.between(0, 1)
    [(0, 1)]
    """

    def __init__(self) -> None:
        self.tables: dict[tuple[str, ...], int] = {}
        self._rows: dict[Hashable, tuple[int, list[Scalar]]] = {}  # the first table of each example
        self._spreads: dict[int, list[float]] = {}

    def add(self, place: Hashable, columns: Sequence[str], values: Sequence[Scalar]) -> int:
        """Take a row of an example; return the number of its table. Only the first row of an example counts."""
        table = self.tables.setdefault(tuple(map(cut, columns)), len(self.tables))
        self._rows.setdefault(place, (table, list(values)))
        return table

    def between(self, target: Hashable, example: Hashable, most: int = _MOST) -> list[tuple[int, int]]:
        """Return in which columns of its table an example differs most from a target.

        Differences of numbers are divided by the column's standard deviation over all rows. Two names that differ count
        as one standard deviation. Call it when all rows are there.

        Returns:
            Pairs of a column's number, and 1 where the example's value is higher, −1 where it is lower, 0 where the two
            are not to be compared; the largest difference first. Empty if they are not of the same table.
        """
        if target not in self._rows or example not in self._rows:
            return []
        (table, of_target), (other, values) = self._rows[target], self._rows[example]
        if table != other:
            return []
        pairs = zip(values, of_target, self._spread(table), strict=True)
        differences = [_difference(value, own, spread) for value, own, spread in pairs]
        order = sorted(range(len(differences)), key=lambda column: -abs(differences[column][0]))
        return [(column, differences[column][1]) for column in order[:most] if differences[column][0]]

    def _spread(self, table: int) -> list[float]:
        """Return the standard deviation of each column of numbers."""
        if table not in self._spreads:
            rows = [values for own, values in self._rows.values() if own == table]
            self._spreads[table] = [_deviation(column) for column in zip(*rows, strict=True)]
        return self._spreads[table]


def _difference(value: Scalar, own: Scalar, spread: float) -> tuple[float, int]:
    """Return the size of a difference in standard deviations, and its sign; see `Differences.between`."""
    if _is_finite(value) and _is_finite(own):
        difference = float(value) - float(own)  # type: ignore[arg-type]
        return (abs(difference) / (spread or 1.0), 1 if difference > 0 else -1) if difference else (0.0, 0)
    return float(value_text(value) != value_text(own)), 0


def _deviation(column: Sequence[Scalar]) -> float:
    numbers = [float(value) for value in column if _is_finite(value)]  # type: ignore[arg-type]
    return float(np.std(numbers)) if numbers else 0.0


def _is_finite(value: Scalar) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
