"""Examples, drawn for what they are: what of each is put into the file, as values that JSON can hold."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightning_trak.results.kinds import (
    Array,
    Image,
    Part,
    Scalar,
    Series,
    Table,
    Text,
    Tokens,
    Unknown,
    described,
    in_words,
    parts,
)
from lightning_trak.results.numbers import number_text
from lightning_trak.results.report.png import colour_of, data_uri, png, thumbnail

Drawing = dict[str, Any]
Render = Callable[[Any], Any]

_CHARACTERS, _TOKENS, _COLUMNS, _CHANNELS, _CLASSES = 2000, 300, 200, 8, 12  # what is shown of an example, at most
_OF_A_WORD = 200  # characters of a token, a name or a value
_BUCKETS = 100  # parts of a series, of each of which the lowest and the highest value are shown
_SCALE = 1000  # values of a series are whole numbers from 0 to it
_MARKED = 3  # columns in which an example differs most from the target
_BYTES, _OF_A_PIXEL = 48e6, 1.8  # of all images together, about; of a pixel of a photograph as PNG
_EDGES = 32, 160  # pixels
_DPI = 80  # of figures that a user's function draws


class Drawings:
    """Draws the examples of both data sets, each once.

    Args:
        count: how many there will be, about. The more, the smaller are images.
        render: a user's function, see `Attribution.report`.

    Attributes:
        drawn: a list of drawings for each example, in the order of `add`.
        tables: the names of the columns of every kind of table.
    """

    def __init__(self, count: int, render: Render | None = None) -> None:
        edge = math.sqrt(_BYTES / (_OF_A_PIXEL * max(1, count)))
        self._edge, self._render = int(min(max(edge, _EDGES[0]), _EDGES[1])), render
        self.drawn: list[list[Drawing]] = []
        self.tables: dict[tuple[str, ...], int] = {}
        self._rows: dict[int, tuple[int, list[Scalar]]] = {}  # the first table of each example
        self._spreads: dict[int, list[float]] = {}

    def add(self, example: Any) -> tuple[int, Scalar]:
        """Draw an example; return its place among all, and its label."""
        found = described(example)
        drawn = found.parts if self._render is None else self._rendered(self._render(example))
        place, several = len(self.drawn), len(drawn) > 1
        self.drawn.append([self._drawing(place, name if several else "", part) for name, part in drawn])
        return place, found.label

    def _rendered(self, value: Any) -> list[tuple[str, Part | bytes]]:
        """Return what a user's function drew."""
        if hasattr(value, "savefig"):
            return [("", _file_of(value))]
        found = parts(value)
        unknown = next((part.what for _, part in found if isinstance(part, Unknown)), None)
        if unknown is not None or not found:
            raise TypeError(
                f"render must return text, an image, a mapping, a tuple of these, or a figure of matplotlib; got"
                f" {unknown or in_words(value)}."
            )
        return list(found)

    def _drawing(self, place: int, name: str, part: Part | bytes) -> Drawing:
        drawing = {"name": _cut(name)} if name else {}
        if isinstance(part, Table):
            columns = list(part.values)[:_COLUMNS]
            table = self.tables.setdefault(tuple(map(_cut, columns)), len(self.tables))
            values = [part.values[column] for column in columns]
            self._rows.setdefault(place, (table, values))
            shown = {"kind": "table", "columns": table, "values": list(map(value_text, values))}
            return drawing | shown | _left_out(len(part.values), _COLUMNS)
        return drawing | self._drawn_alone(part)

    def _drawn_alone(self, part: Part | bytes) -> Drawing:
        if isinstance(part, bytes):
            return {"kind": "image", "source": data_uri(part)}
        if isinstance(part, Image):
            pixels = thumbnail(part, self._edge)
            size = {"height": pixels.shape[0], "width": pixels.shape[1]}
            return {"kind": "image", "source": data_uri(png(pixels)), **size} | _legend(part.classes)
        if isinstance(part, Text):
            return {"kind": "text", "text": part.text[:_CHARACTERS]} | _left_out(len(part.text), _CHARACTERS)
        if isinstance(part, Tokens):
            shown = [_cut(token) for token in part.tokens[:_TOKENS]]
            return {"kind": "tokens", "tokens": shown} | _left_out(len(part.tokens), _TOKENS)
        if isinstance(part, Series):
            return _curves(part.values)
        assert isinstance(part, Unknown)
        return {"kind": "unknown", "text": part.what}

    def marks(self, target: int, example: int) -> list[tuple[int, int]]:
        """Return in which columns of its table an example differs most from a target.

        Differences of numbers are divided by the column's standard deviation over all examples that are drawn. Two
        names that differ count as one standard deviation.

        Args:
            target: the place of a drawing.
            example: likewise.

        Returns:
            At most three pairs of a column's number, and 1 where the example's value is higher, −1 where it is lower, 0
            where the two are not to be compared; the largest difference first.
        """
        if target not in self._rows or example not in self._rows:
            return []
        (table, of_target), (other, values) = self._rows[target], self._rows[example]
        if table != other:
            return []
        pairs = zip(values, of_target, self._spread(table), strict=True)
        differences = [_difference(value, own, spread) for value, own, spread in pairs]
        order = sorted(range(len(differences)), key=lambda column: -abs(differences[column][0]))
        return [(column, differences[column][1]) for column in order[:_MARKED] if differences[column][0]]

    def _spread(self, table: int) -> list[float]:
        """Return the standard deviation of each column of numbers."""
        if table not in self._spreads:
            rows = [values for own, values in self._rows.values() if own == table]
            self._spreads[table] = [_deviation(column) for column in zip(*rows, strict=True)]
        return self._spreads[table]


def value_text(value: Scalar) -> str:
    """Return a value of a table, a label or a prediction as text.

    >>> value_text(True), value_text(3), value_text(0.25), value_text("cat"), value_text(None)
    ('yes', '3', '0.250', 'cat', '')
    """
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return _cut(value) if isinstance(value, str) else number_text(value)


def label_text(label: Scalar) -> str:
    """Return a label or a prediction as text: a class by its name, also where it is stored as a real number.

    >>> label_text(1.0), label_text(True), label_text(0.25)
    ('1', 'yes', '0.250')
    """
    name = class_of(label)
    return value_text(label if name is None else name)


def class_of(value: Scalar) -> str | int | None:
    """Return a label or a prediction as the name of a class; None for what is a real number.

    >>> class_of(1.0), class_of("cat"), class_of(0.5)
    (1, 'cat', None)
    """
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value


def _difference(value: Scalar, own: Scalar, spread: float) -> tuple[float, int]:
    """Return the size of a difference in standard deviations, and its sign; see `Drawings.marks`."""
    if _is_finite(value) and _is_finite(own):
        difference = float(value) - float(own)  # type: ignore[arg-type]
        return (abs(difference) / (spread or 1.0), 1 if difference > 0 else -1) if difference else (0.0, 0)
    return float(value_text(value) != value_text(own)), 0


def _deviation(column: Sequence[Scalar]) -> float:
    numbers = [float(value) for value in column if _is_finite(value)]  # type: ignore[arg-type]
    return float(np.std(numbers)) if numbers else 0.0


def _is_finite(value: Scalar) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _curves(values: Array) -> Drawing:
    """Return a series as curves of whole numbers between its lowest and its highest value."""
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    unit = (high - low) / _SCALE or 1.0
    channels = [[_scaled(value, low, unit) for value in _outline(channel)] for channel in values.T[:_CHANNELS]]
    ends = {"low": low, "lowText": number_text(low), "high": high, "highText": number_text(high)}
    shown: Drawing = {"kind": "series", **ends, "length": len(values), "channels": channels}
    return shown | _left_out(values.shape[1], _CHANNELS)


def _scaled(value: float, low: float, unit: float) -> int | None:
    return round((value - low) / unit) if math.isfinite(value) else None


def _outline(channel: Array) -> list[float]:
    """Return a curve with its lowest and highest value in each of many parts, in their order; a short one as it is."""
    if len(channel) <= 2 * _BUCKETS:
        return list(map(float, channel))
    points: list[float] = []
    for part in np.array_split(channel, _BUCKETS):
        known = np.where(np.isfinite(part))[0]
        if not len(known):
            points += [math.nan, math.nan]
        else:
            ends = sorted((known[part[known].argmin()], known[part[known].argmax()]))
            points += [float(part[end]) for end in ends]
    return points


def _legend(classes: Array | None) -> Drawing:
    """Return the classes in a class map that have a colour, with its place in the palette."""
    numbers = [] if classes is None else np.unique(classes).tolist()
    shown = [(str(number), colour_of(number)) for number in numbers if colour_of(number) is not None]
    return {"classes": shown[:_CLASSES]} | _left_out(len(shown), _CLASSES) if shown else {}


def _left_out(length: int, limit: int) -> Drawing:
    """Return how much is not shown, if anything."""
    return {"more": length - limit} if length > limit else {}


def _cut(text: object) -> str:
    """Return a word that is not too long."""
    word = str(text)
    return word if len(word) <= _OF_A_WORD else f"{word[:_OF_A_WORD]}…"


def _file_of(figure: Any) -> bytes:
    """Return a figure of matplotlib as PNG, and close it: thousands may come."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def read(data: Any, row: int) -> Any:
    """Return an example of a data set; of a data frame, a row by the names of its columns."""
    if not hasattr(data, "iloc"):
        return data[row]
    return {name: data[name].iloc[row] for name in data.columns}  # each of its own type; a row has one for all
