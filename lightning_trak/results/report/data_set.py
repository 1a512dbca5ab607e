"""The rows of a data set that the report shows, each once, with what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning_trak.results.examples import Examples
from lightning_trak.results.kinds import Scalar
from lightning_trak.results.reading import check_data_set, read
from lightning_trak.results.report.drawing import Drawings
from lightning_trak.results.values import label_text, value_text

LABEL, PREDICTION = "label", "prediction"  # the known names of columns


class DataSet:
    """The rows of a data set that are shown, and what is known of them.

    Args:
        name: of the argument, for errors.
        known: ids and columns.
        data: the examples; None to draw none.
        drawings: draws them.

    Attributes:
        labels: of the rows that are shown.
    """

    def __init__(self, name: str, known: Examples, data: Any, drawings: Drawings) -> None:
        self._known, self._data, self.drawings = known, data, drawings
        self._places: dict[int, int] = {}  # of rows, in the order in which they were first shown
        self._drawn: list[int | None] = []
        self.labels: list[Scalar] = []
        if data is not None:
            check_data_set(name, data, len(known))

    def shown(self, row: int) -> int:
        """Show a row, unless it is shown; return its place among those that are."""
        if row not in self._places:
            self._places[row] = len(self._places)
            drawn, label = (None, None) if self._data is None else self.drawings.add(read(self._data, row))
            self._drawn.append(drawn)
            self.labels.append(self._known.columns[LABEL][row] if LABEL in self._known.columns else label)
        return self._places[row]

    def drawing(self, row: int) -> int | None:
        """Return the place of a row's drawing among all drawings."""
        return self._drawn[self._places[row]]

    def column(self, name: str) -> list[Scalar]:
        """Return the values of a column in the rows that are shown."""
        values = self._known.columns.get(name)
        return [None if values is None else values[row] for row in self._places]

    def content(self) -> dict[str, Any]:
        """Return all that is known of the rows that are shown."""
        others = [name for name in self._known.columns if name not in (LABEL, PREDICTION)]
        return {
            "rows": list(self._places),
            "numbered": isinstance(self._known.ids, range),
            "ids": [value_text(self._known.ids[row]) for row in self._places],
            "labels": texts(self.labels, label_text),
            "predictions": texts(self.column(PREDICTION), label_text),
            "columns": [{"name": value_text(name), "values": texts(self.column(name))} for name in others],
            "drawings": self._drawn,
        }


def texts(values: Iterable[Scalar], text: Callable[[Scalar], str] = value_text) -> list[str | None]:
    """Return values as texts; None stays."""
    return [None if value is None else text(value) for value in values]
