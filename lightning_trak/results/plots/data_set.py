"""Rows of a data set as a picture shows them: id, label, verdict and parts; each is read once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from lightning_trak.results.differences import Differences
from lightning_trak.results.examples import Examples
from lightning_trak.results.kinds import Described, Scalar, Table, Unknown, described
from lightning_trak.results.plots.drawing import Parts, shown_parts
from lightning_trak.results.reading import check_data_set, read
from lightning_trak.results.values import label_text

_LABEL = 24  # characters
_NOTHING = (("", Unknown("nothing to draw")),)


class Reader:
    """The rows of a data set: ids, labels, and what examples are made of. Each is read once.

    Args:
        name: of the argument, for errors.
        known: ids and columns.
        data: the examples; None if there are none.
        differences: takes the rows of tables; a new one if None.
    """

    def __init__(self, name: str, known: Examples, data: Any, differences: Differences | None = None) -> None:
        if data is not None:
            check_data_set(name, data, len(known))
        self._name, self._known, self._data = name, known, data
        self._found: dict[int, Described] = {}
        self.differences = Differences() if differences is None else differences

    def number(self, row: int) -> str:
        """Return the id of a row, if it is a number; or else nothing."""
        identity = self._known.ids[row]
        return "" if isinstance(identity, str) else str(identity)

    def name(self, row: int) -> str:
        """Return the id of a row, if it is text, on one line; or else nothing."""
        identity = self._known.ids[row]
        return " ".join(identity.split()) if isinstance(identity, str) else ""

    def label(self, row: int) -> list[str]:
        """Return the label of a row as lines; none where it is unknown."""
        label = self._label(row)
        return [] if label is None else f"label {_short(label)}".splitlines()

    def verdict(self, row: int) -> list[str]:
        """Return the label of a row as lines, and the prediction if it is another."""
        label, predictions = self._label(row), self._known.columns.get("prediction")
        prediction = None if predictions is None else predictions[row]
        wrong = prediction is not None and (label is None or label_text(label) != label_text(prediction))
        return [*self.label(row), *(f"predicted {_short(prediction)}".splitlines() if wrong else [])]

    def parts(self, row: int) -> Parts | None:
        """Return what is drawn of an example; None if there is no data set."""
        return None if self._data is None else shown_parts(self._read(row).parts) or _NOTHING

    def place(self, row: int) -> Hashable:
        """Return the name of a row among those of both data sets."""
        return self._name, row

    def _label(self, row: int) -> Scalar:
        if "label" in self._known.columns:
            return self._known.columns["label"][row]
        return None if self._data is None else self._read(row).label

    def _read(self, row: int) -> Described:
        if row not in self._found:
            self._found[row] = described(read(self._data, row))
            for _, part in self._found[row].parts:
                if isinstance(part, Table):
                    self.differences.add(self.place(row), list(part.values), list(part.values.values()))
        return self._found[row]


def _short(label: Scalar) -> str:
    text = label_text(label)
    return text if len(text) <= _LABEL else f"{text[:_LABEL]}…"
