"""Examples, drawn for what they are: images, class maps, text, tokens, tables, series, and several of these."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_trak.results.kinds import Image, Part, Series, Table, Text, Unknown
from lightning_trak.results.numbers import number_text
from lightning_trak.results.plots.axes import without_ticks
from lightning_trak.results.report.png import PALETTE, colour_of, thumbnail
from lightning_trak.results.values import cut, value_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Parts = Sequence[tuple[str, Part]]
Marks = Sequence[tuple[str, int]]

_EDGE = 256  # pixels of the longer side of an image, at most
_PARTS, _CHANNELS = 3, 8  # what is drawn of an example, at most
_SIZE, _SMALL = 7, 6  # points
CHARACTER, _HEIGHT = 0.6, 1.25  # of a character, about, and of a line, in parts of the size
_ARROWS = {1: " ▲", -1: " ▼", 0: ""}
_OF_IMAGE = 2  # times as high as another part


def shown_parts(parts: Parts) -> Parts:
    """Return what is drawn of an example: at most three parts, and what is unknown only if nothing else is there."""
    known = [one for one in parts if not isinstance(one[1], Unknown)]
    return (known or list(parts))[:_PARTS]


def draw(axis: Axes, parts: Parts, marks: Marks | None = None) -> None:
    """Draw an example.

    Args:
        axis: where.
        parts: what the example is made of, see `shown_parts`.
        marks: the columns of its table that are shown, with 1 where a value is higher than the target's, −1 where it is
            lower, and 0 otherwise; the first columns if None.
    """
    without_ticks(axis)
    if len(parts) == 1:
        _draw_part(axis, "", parts[0][1], marks)
        return
    table = next((part for _, part in parts if isinstance(part, Table)), None)
    heights = [_OF_IMAGE if isinstance(part, Image) else 1 for _, part in parts]
    for number, (name, part) in enumerate(parts):
        rest = 1 - sum(heights[: number + 1]) / sum(heights)
        own = axis.inset_axes((0, rest + 0.01, 1, heights[number] / sum(heights) - 0.02))
        without_ticks(own)
        own.set_frame_on(False)
        _draw_part(own, name, part, marks if part is table else None)


def write(axis: Axes, *texts: str, **style: Any) -> None:
    """Write texts in the middle, each on its own lines, wrapped to the width of the axes."""
    style = {"ha": "center", "va": "center", "fontsize": _SIZE, "parse_math": False, **style}
    lines = [line for text in texts for line in _wrapped(axis, text)]
    axis.text(0.5, 0.5, "\n".join(lines), transform=axis.transAxes, **style)


def classes_of(parts: Parts) -> dict[str, str]:
    """Return the colours of the classes in class maps, by class."""
    maps = [part.classes for _, part in parts if isinstance(part, Image) and part.classes is not None]
    numbers = sorted({number for classes in maps for number in np.unique(classes).tolist()})
    places = {number: colour_of(number) for number in numbers}
    return {str(number): PALETTE[place] for number, place in places.items() if place is not None}


def share_scale(cells: Sequence[Axes]) -> None:
    """Draw the curves of all cells on one scale for each part; the first cell says which."""
    curves: dict[int, list[Any]] = {}
    for cell in cells:
        for number, axis in enumerate(cell.child_axes or [cell]):
            if axis.lines:
                curves.setdefault(number, []).append(axis)
    for axes in curves.values():
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for axis in axes for line in axis.lines])
        known = values[np.isfinite(values)]
        if known.size:
            _scale(axes, float(known.min()), float(known.max()))


def _scale(axes: Sequence[Any], low: float, high: float) -> None:
    margin = 0.15 * (high - low) or 0.5
    for axis in axes:
        axis.set_ylim(low - margin, high + margin)
    style: dict[str, Any] = {"transform": axes[0].transAxes, "fontsize": _SMALL, "color": "0.4"}
    axes[0].text(0.02, 0.98, number_text(high), va="top", **style)
    axes[0].text(0.02, 0.02, number_text(low), va="bottom", **style)


def _draw_part(axis: Axes, name: str, part: Part, marks: Marks | None) -> None:
    if isinstance(part, Image):
        pixels = thumbnail(part, _EDGE)
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    elif isinstance(part, Series):
        for channel, colour in zip(part.values.T[:_CHANNELS], PALETTE, strict=False):
            axis.plot(channel, color=colour, linewidth=0.9)
        axis.margins(x=0.02)
    elif isinstance(part, Table):
        _write_lines(axis, _lines(part, marks))
    elif isinstance(part, Unknown):
        write(axis, part.what, color="0.45")
    else:
        text = part.text if isinstance(part, Text) else " ".join(part.tokens)
        _write_lines(axis, _wrapped(axis, f"{name}: {text}" if name else text))


def _lines(table: Table, marks: Marks | None) -> list[str]:
    """Return the values of some columns, one a line."""
    if marks is None:
        return [f"{name}: {value_text(value)}" for name, value in table.values.items()]
    lines = [f"{name}: {value_text(table.values[name])}{_ARROWS[sign]}" for name, sign in marks]
    return lines or ["as the target"]


def _write_lines(axis: Axes, lines: Sequence[str]) -> None:
    """Write lines from the top, as many as there is room for."""
    width, height = _room(axis)
    shown = [*lines[: height - 1], "…"] if len(lines) > height else lines
    text = "\n".join(cut(_printable(line), width) for line in shown)
    corner: dict[str, Any] = {"xytext": (4, -4), "xycoords": "axes fraction", "textcoords": "offset points"}
    axis.annotate(text, (0, 1), **corner, va="top", fontsize=_SIZE, parse_math=False, clip_on=True)


def _wrapped(axis: Axes, text: str) -> list[str]:
    """Return the lines of a text, as many as there is room for."""
    width, height = _room(axis)
    return textwrap.wrap(" ".join(_printable(text).split()), width, max_lines=height, placeholder=" …") or [""]


def _room(axis: Axes) -> tuple[int, int]:
    """Return the numbers of characters in a line, and of lines."""
    extent, points = axis.get_window_extent(), 72 / axis.figure.dpi / _SIZE
    return max(4, int(0.95 * extent.width * points / CHARACTER)), max(1, int((extent.height * points - 1) / _HEIGHT))


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text)
