"""Targets beside their most helpful and most harmful training examples, or beside bars of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_trak.influence import Extremes
from lightning_trak.results.examples import Examples
from lightning_trak.results.numbers import number_text
from lightning_trak.results.plots.axes import (
    HARMFUL,
    HELPFUL,
    MARKED,
    axes_of_shape,
    is_axes,
    one_axes,
    pyplot,
    without_ticks,
)
from lightning_trak.results.plots.data_set import Reader
from lightning_trak.results.plots.grid import Cell, draw_grid
from lightning_trak.results.sides import check_finite, of_sign
from lightning_trak.results.subsets import rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIDES = (("most helpful", "positive", HELPFUL), ("most harmful", "negative", HARMFUL))
_FIRST, _ID = 5, 28  # targets that are drawn if none are named; characters of an id


Sides = tuple[list[tuple[int, float]], list[tuple[int, float]]]  # training examples with scores: helpful, harmful


def plot_extremes(
    extremes: Extremes,
    known: tuple[Examples, Examples],
    data: tuple[Any, Any],
    columns: Sequence[int] | None,
    marked: Any,
    ax: Any,
) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw one row per target; see `Attribution.plot`."""
    pyplot()
    m, k = len(known[1]), extremes.top.indices.shape[1]
    shown = _checked(columns, m)
    rows = set() if marked is None else set(rows_of(marked, known[0], "marked"))
    check_finite(extremes.top, extremes.bottom)
    helpful, harmful = of_sign(extremes.top, 1), of_sign(extremes.bottom, -1)
    scored = [(column, (helpful[column], harmful[column])) for column in shown]
    train = Reader("train", known[0], data[0])
    targets = Reader("targets", known[1], data[1], train.differences)
    if data[0] is None:
        return _bars(scored, k, train, targets, rows, ax)
    return draw_grid([_cells(*one, k, train, targets, rows) for one in scored], train.differences, ax)


def _checked(columns: Any, m: int) -> list[int]:
    """Return the targets to draw."""
    try:
        shown = list(range(min(_FIRST, m))) if columns is None else [index(column) for column in columns]
    except TypeError as error:
        raise TypeError(f"columns must be a list of targets, by index, got {columns!r}.") from error
    if not shown or not all(0 <= column < m for column in shown):
        raise ValueError(f"columns must name some of the {m} targets, 0 to {m - 1}; got {columns!r}.")
    return shown


def _cells(column: int, sides: Sides, k: int, train: Reader, targets: Reader, marked: set[int]) -> list[Cell]:
    """Return the cells of a row: the target, k helpful and k harmful training examples."""
    title = [f"target {targets.number(column)}".rstrip(), *targets.verdict(column)]
    cells = [Cell(title, targets.name(column), place=targets.place(column), parts=targets.parts(column))]
    for ranked, (side, sign, colour) in zip(sides, _SIDES, strict=True):
        for number in range(k):
            heading = side if number == 0 else ""
            if number < len(ranked):
                row, score = ranked[number]
                title, below = [*train.label(row), number_text(score, signed=True)], f"#{train.number(row)}"
                example = train.place(row), train.parts(row), row in marked
                cells.append(Cell(title, train.name(row) or below, colour, *example, heading))
            else:
                first = f"no {'other ' * bool(number)}score is {sign}" if number == len(ranked) else ""
                cells.append(Cell(colour=colour, heading=heading, missing=first))
    return cells


def _tail(name: str) -> str:
    """Return the end of a long id: it differs between files of a folder."""
    return name if len(name) <= _ID else f"…{name[-_ID:]}"


def _bars(
    scored: Sequence[tuple[int, Sides]], k: int, train: Reader, targets: Reader, marked: set[int], ax: Any
) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw the scores of each target as bars; return the figure, and as many axes."""
    m = len(scored)
    if ax is None:
        figure, axes = pyplot().subplots(m, 1, figsize=(6, m * (0.9 + 0.34 * k)), squeeze=False, layout="constrained")
        axes = axes[:, 0]
    elif m == 1 and is_axes(ax):
        figure, single = one_axes(ax, (0, 0))
        axes = np.array([single])
    elif is_axes(ax):
        raise ValueError(
            f"ax is one Axes, and bars of {m} targets need one each. Pass an array of {m}, or one target: columns=[0]."
        )
    else:
        figure, axes = axes_of_shape(ax, (m,), "one for each target")
    for axis, one in zip(axes, scored, strict=True):
        _draw_bars(axis, *one, train, targets, marked)
    return figure, axes


def _draw_bars(axis: Axes, column: int, sides: Sides, train: Reader, targets: Reader, marked: set[int]) -> None:
    helpful, harmful = sides
    ranked = [*helpful, *harmful[::-1]]
    rows, values = [row for row, _ in ranked], [value for _, value in ranked]
    places = np.arange(len(values))
    bars = axis.barh(places, values, color=[HELPFUL if value > 0 else HARMFUL for value in values])
    axis.bar_label(bars, [number_text(value, signed=True) for value in values], fontsize=7, padding=2)
    names = [", ".join([_tail(train.name(row)) or f"train {train.number(row)}", *train.label(row)]) for row in rows]
    axis.set_yticks(places, names, fontsize=8, parse_math=False)
    for row, bar, name in zip(rows, bars, axis.get_yticklabels(), strict=True):
        if row in marked:
            bar.set(edgecolor=MARKED, linewidth=2.5)
            name.set_fontweight("bold")
    framed = [bar for row, bar in zip(rows, bars, strict=True) if row in marked]
    if framed:
        axis.legend(framed[:1], ["marked"], frameon=False, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.25)  # for the numbers
    axis.tick_params(axis="x", labelsize=8)
    if values:
        axis.axvline(0, color="black", linewidth=0.8)
    else:
        without_ticks(axis)
        axis.text(0.5, 0.5, "no score differs from 0", transform=axis.transAxes, ha="center", fontsize=8)
    target = _tail(targets.name(column)) or targets.number(column)
    title = [f"target {target}", *targets.verdict(column)]
    axis.set_title(", ".join(title), fontsize=10, parse_math=False)
    axis.set_xlabel("score", fontsize=8)
