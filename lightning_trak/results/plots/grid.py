"""The grid: a row for each target, with a cell for the target and for each of its training examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_trak.results.differences import Differences
from lightning_trak.results.kinds import Image, Series, Table, Unknown
from lightning_trak.results.plots.axes import MARKED, Box, axes_of_shape, box, is_axes
from lightning_trak.results.plots.drawing import CHARACTER, Marks, Parts, classes_of, draw, share_scale, write
from lightning_trak.results.values import cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rectangle = tuple[float, float, float, float]

_IMAGE, _PAIR, _OTHER = (0.9, 0.9), (1.4, 1.6), (1.9, 1.2)  # inches: sizes of cells of an image, of one with others
_EDGE, _GAP, _LINE, _BELOW, _HEADING, _LEGEND = 0.12, 0.12, 0.155, 0.2, 0.24, 0.3  # inches around cells
_SMALLEST = 0.2  # inches
_TITLE, _SMALL = 8, 7  # points
_COLUMNS, _CLASSES = 5, 12  # what is shown, at most, of a table, and of a class map in the legend


@dataclass(frozen=True)
class Cell:
    """A place of the grid.

    Attributes:
        title: lines above it.
        below: a line below it.
        colour: of the text around it.
        place: of its example among those that may differ.
        parts: what its example is made of; None if that is unknown.
        marked: whether it gets a thick frame.
        heading: what begins here: the helpful or the harmful examples.
        missing: what to write where there is no example.
    """

    title: Sequence[str] = ()
    below: str = ""
    colour: str = "black"
    place: Hashable = None
    parts: Parts | None = None
    marked: bool = False
    heading: str = ""
    missing: str = ""

    @property
    def table(self) -> Table | None:
        """The table of its example, if it has one."""
        return next((part for _, part in self.parts or () if isinstance(part, Table)), None)


@dataclass(frozen=True)
class Layout:
    """Where cells are. Images of a target are in one line. Other cells are wider, and in two lines.

    Attributes:
        rows: the number of targets.
        k: how many helpful and how many harmful training examples each has.
        cell: width and height of a cell in a new figure, in inches.
        wide: whether cells are in two lines.
        tall: whether the cell of a target then is as high as both.
        lines: of the longest title.
        legend: whether there is one.
    """

    rows: int
    k: int
    cell: tuple[float, float]
    wide: bool
    tall: bool
    lines: int
    legend: bool

    def size(self) -> tuple[float, float]:
        """Return width and height of a new figure in inches."""
        (width, height), (around, between) = self.cell, self._spaces()
        return around[0] + self._counts[1] * width, around[1] + self._counts[0] * (height + between)

    def rectangles(self, whole: Box) -> Iterator[list[Rectangle]]:
        """Yield the places of the cells of each target, in parts of a box: target, helpful and harmful examples."""
        (across, down), between = self._spaces()
        lines, columns = self._counts
        width, height = (whole.width - across) / columns, (whole.height - down) / lines - between
        if min(width, height) < _SMALLEST:
            least = " × ".join(f"{inches:.1f}" for inches in self.size())
            raise ValueError(
                f"ax is too small for {self.rows} targets with {2 * self.k} training examples each: it has"
                f" {whole.width:.1f} × {whole.height:.1f} inches, and {least} are good. Make it larger, with"
                " plt.subplots(figsize=...), or draw fewer: columns=[...], k=... ."
            )

        def cell(line: int, column: int, high: int = 1) -> Rectangle:
            top = _EDGE + (0 if self.wide else _HEADING) + line * (height + between) + self._above
            tall = height + (high - 1) * (height + between)
            left = _EDGE + column * (width + _GAP)
            bottom = whole.height - top - tall
            return left / whole.width, bottom / whole.height, width / whole.width, tall / whole.height

        for row in range(self.rows):
            if self.wide:
                sides = [cell(2 * row + side, 1 + column) for side in (0, 1) for column in range(self.k)]
                yield [cell(2 * row, 0, 1 + self.tall), *sides]
            else:
                yield [cell(row, column) for column in range(columns)]

    @property
    def _counts(self) -> tuple[int, int]:
        """The numbers of lines and of columns."""
        return (2 * self.rows, 1 + self.k) if self.wide else (self.rows, 1 + 2 * self.k)

    @property
    def _above(self) -> float:
        """The inches above a cell."""
        return 0.06 + _LINE * self.lines + _HEADING * self.wide

    def _spaces(self) -> tuple[tuple[float, float], float]:
        """Return the inches around all cells, across and down; and those above and below each line."""
        down = 2 * _EDGE + _HEADING * (not self.wide) + _LEGEND * self.legend
        return (2 * _EDGE + (self._counts[1] - 1) * _GAP, down), self._above + _BELOW


def draw_grid(rows: Sequence[Sequence[Cell]], differences: Differences, ax: Any) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw cells; return the figure and the axes, (targets, 1 + 2k).

    Args:
        rows: the cells of each target: its own, k helpful, k harmful.
        differences: the tables of all examples.
        ax: axes of that shape; or one, which is divided; or None.
    """
    k, cells = len(rows[0]) // 2, [cell for row in rows for cell in row]
    shown = [_marks(row, differences) for row in rows]
    handles = _handles(cells, shown)
    layout = _layout(rows, bool(handles))
    if ax is None or is_axes(ax):
        whole = box(ax, layout.size())
        figure = whole.figure
        axes = np.array([[whole.add(place) for place in places] for places in layout.rectangles(whole)], dtype=object)
        if handles:
            whole.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=_TITLE)
    else:
        figure, axes = axes_of_shape(ax, (len(rows), 1 + 2 * k), f"(targets, 1 + 2k): each beside {k} + {k} examples")
    for number, (row, own, marks) in enumerate(zip(rows, axes, shown, strict=True)):
        lines = max(len(cell.title) for cell in row) if layout.wide or number == 0 else None
        for cell, axis, columns in zip(row, own, marks, strict=True):
            _draw_cell(axis, cell, columns, lines)
        share_scale(list(own))
    return figure, axes


def _draw_cell(axis: Axes, cell: Cell, marks: Marks | None, lines: int | None) -> None:
    """Draw a cell; its heading stands above so many lines of titles, if it is drawn."""
    points = axis.get_window_extent().width * 72 / axis.figure.dpi
    title = [cut(line, max(4, int(points / (_TITLE * CHARACTER)))) for line in cell.title]
    if cell.parts is None:
        axis.set_axis_off()
        write(axis, *(title or [cell.missing]), color="0.45" if cell.missing else "black")
    else:
        draw(axis, cell.parts, marks)
        axis.set_title("\n".join(title), fontsize=_TITLE, color=cell.colour, parse_math=False)
        below = cell.below[-int(points / (_SMALL * CHARACTER)) :]  # the end differs between files of a folder
        axis.set_xlabel(below if below == cell.below else f"…{below}", fontsize=_SMALL, labelpad=2, parse_math=False)
    if cell.marked:
        for spine in axis.spines.values():
            spine.set(edgecolor=MARKED, linewidth=3)
    if cell.heading and lines is not None:
        height = (lines * _LINE + 0.1) * 72
        above: dict[str, Any] = {"xytext": (0, height), "xycoords": "axes fraction", "textcoords": "offset points"}
        axis.annotate(cell.heading, (0, 1), **above, color=cell.colour, fontsize=10)


def _layout(rows: Sequence[Sequence[Cell]], legend: bool) -> Layout:
    """Choose a layout by the kinds of what is shown."""
    cells = [cell for row in rows for cell in row]
    shown = [[type(part) for _, part in cell.parts] for cell in cells if cell.parts is not None]
    kinds = {kind for own in shown for kind in own}
    wide = any(len(own) > 1 for own in shown) or not kinds <= {Image, Unknown}
    size = _IMAGE if not wide else _PAIR if Image in kinds else _OTHER
    tall = not kinds & {Image, Series}  # these are compared: all are of one size
    return Layout(len(rows), len(rows[0]) // 2, size, wide, tall, max(len(cell.title) for cell in cells), legend)


def _marks(row: Sequence[Cell], differences: Differences) -> list[Marks | None]:
    """Return which columns of the table of each cell are shown: those that differ most between target and examples."""
    target, *examples = row
    found = [_differing(target, cell, differences) for cell in examples]
    counts = Counter(name for marks in found for name, _ in marks or ())
    return [[(name, 0) for name, _ in counts.most_common()] or None, *found]


def _differing(target: Cell, cell: Cell, differences: Differences) -> Marks | None:
    if target.table is None or cell.table is None or list(target.table.values) != list(cell.table.values):
        return None
    names = list(cell.table.values)
    return [(names[column], sign) for column, sign in differences.between(target.place, cell.place, _COLUMNS)]


def _handles(cells: Sequence[Cell], marks: Sequence[Sequence[Marks | None]]) -> list[Any]:
    """Return what the legend explains: classes of pixels, arrows of tables, and frames of marked examples."""
    from matplotlib.patches import Patch

    classes = {name: colour for cell in cells for name, colour in classes_of(cell.parts or ()).items()}
    names = sorted(classes, key=int)
    shown = [Patch(color=classes[name], label=f"class {name}") for name in names[:_CLASSES]]
    more = [Patch(color="none", label=f"and {len(names) - _CLASSES} more")] if len(names) > _CLASSES else []
    frame = Patch(facecolor="none", edgecolor=MARKED, linewidth=2.5, label="marked")
    arrows = Patch(color="none", label="▲ ▼ higher, lower than in the target")
    differ = any(sign for row in marks for own in row for _, sign in own or ())
    framed = any(cell.marked for cell in cells)
    return [*shown, *more, *([arrows] if differ else []), *([frame] if framed else [])]
