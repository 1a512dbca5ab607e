"""Examples, drawn for what they are: what of each is put into the file, as values that JSON can hold."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lightning_trak.results.differences import Differences
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
from lightning_trak.results.values import cut, value_text

Drawing = dict[str, Any]
Render = Callable[[Any], Any]

_CHARACTERS, _TOKENS, _COLUMNS, _CHANNELS, _CLASSES = 2000, 300, 200, 8, 12  # what is shown of an example, at most
_BUCKETS = 100  # parts of a series, of each of which the lowest and the highest value are shown
_SCALE = 1000  # values of a series are whole numbers from 0 to it
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
        marks: in which columns the example of a drawing differs most from that of another, see `Differences.between`.
    """

    def __init__(self, count: int, render: Render | None = None) -> None:
        edge = math.sqrt(_BYTES / (_OF_A_PIXEL * max(1, count)))
        self._edge, self._render = int(min(max(edge, _EDGES[0]), _EDGES[1])), render
        self.drawn: list[list[Drawing]] = []
        self._differences = Differences()
        self.tables, self.marks = self._differences.tables, self._differences.between

    def add(self, example: Any) -> tuple[int, Scalar]:
        """Draw an example; return its place among all, and its label."""
        found = described(example)
        drawn = found.parts if self._render is None else self._rendered(self._render(example))
        place, several = len(self.drawn), len(drawn) > 1
        names = [{"name": cut(name)} if several and name else {} for name, _ in drawn]
        self.drawn.append([own | self._drawing(place, part) for own, (_, part) in zip(names, drawn, strict=True)])
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

    def _drawing(self, place: int, part: Part | bytes) -> Drawing:
        if isinstance(part, Table):
            columns = list(part.values)[:_COLUMNS]
            values = [part.values[column] for column in columns]
            table = self._differences.add(place, columns, values)
            drawing = {"kind": "table", "columns": table, "values": list(map(value_text, values))}
            return drawing | _left_out(len(part.values), _COLUMNS)
        if isinstance(part, bytes):
            return {"kind": "image", "source": data_uri(part)}
        if isinstance(part, Image):
            pixels = thumbnail(part, self._edge)
            size = {"height": pixels.shape[0], "width": pixels.shape[1]}
            return {"kind": "image", "source": data_uri(png(pixels)), **size} | _legend(part.classes)
        if isinstance(part, Text):
            return {"kind": "text", "text": part.text[:_CHARACTERS]} | _left_out(len(part.text), _CHARACTERS)
        if isinstance(part, Tokens):
            shown = [cut(token) for token in part.tokens[:_TOKENS]]
            return {"kind": "tokens", "tokens": shown} | _left_out(len(part.tokens), _TOKENS)
        if isinstance(part, Series):
            return _curves(part.values)
        assert isinstance(part, Unknown)
        return {"kind": "unknown", "text": part.what}


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


def _file_of(figure: Any) -> bytes:
    """Return a figure of matplotlib as PNG, and close it: thousands may come."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
