"""Figures and axes: new ones, or those that a user passes as ``ax``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELPFUL, HARMFUL = "#2166ac", "#b2182b"  # blue and red that colour-blind people can tell apart
MARKED, OTHER = "#e69f00", "0.55"  # orange, gray


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib, which is not installed: pip install matplotlib") from error
    return plt


def one_axes(ax: Any, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return a user's axes with its figure; or new ones, of so many inches."""
    plt = pyplot()
    if ax is None:
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        return figure, ax
    if not is_axes(ax):
        raise TypeError(
            f"ax must be an Axes of matplotlib, got {_named(ax)}. Make one with figure, ax = plt.subplots()."
        )
    return figure_of(ax), ax


def figure_of(ax: Axes) -> Figure:
    """Return the whole figure that has the axes, also if they are in a part of it."""
    figure: Any = ax.figure
    while getattr(figure, "figure", figure) is not figure:
        figure = figure.figure
    return figure


def axes_of_shape(ax: Any, shape: tuple[int, ...], what: str) -> tuple[Figure, npt.NDArray[Any]]:
    """Return a user's axes as an array, with their figure.

    Args:
        ax: an array or a list of Axes; axes of length 1 may be missing, as ``plt.subplots`` leaves them out.
        shape: of the array.
        what: is drawn, for errors.
    """
    given = np.array(ax, dtype=object)
    if not all(map(is_axes, given.flat)) or not given.size:
        raise TypeError(f"ax must be Axes of matplotlib, got {_named(ax)}. {_remedy(shape)}")
    if np.squeeze(given).shape != tuple(length for length in shape if length != 1):
        raise ValueError(f"ax must have the shape {shape}, {what}; got {given.shape}. {_remedy(shape)}")
    return figure_of(given.flat[0]), given.reshape(shape)


def is_axes(ax: Any) -> bool:
    """Say whether something is one Axes of matplotlib."""
    from matplotlib.axes import Axes

    return isinstance(ax, Axes)


class Box(NamedTuple):
    """A rectangle in which axes can be placed: a new figure, or a user's Axes.

    Attributes:
        figure: in which it is.
        add: makes Axes from (left, bottom, width, height), in parts of the box.
        legend: makes a legend of the box.
        width: in inches.
        height: in inches.
    """

    figure: Any
    add: Callable[[tuple[float, float, float, float]], Any]
    legend: Callable[..., Any]
    width: float
    height: float


def box(ax: Any, size: tuple[float, float]) -> Box:
    """Return a new figure of so many inches; or a user's Axes, whose own frame is no longer drawn."""
    plt = pyplot()
    if ax is None:
        figure = plt.figure(figsize=size)
        return Box(figure, figure.add_axes, figure.legend, *size)
    extent, dpi = ax.get_window_extent(), ax.figure.dpi
    ax.set_axis_off()
    return Box(figure_of(ax), ax.inset_axes, ax.legend, extent.width / dpi, extent.height / dpi)


def without_ticks(axis: Axes) -> None:
    """Draw no ticks."""
    axis.set_xticks([])
    axis.set_yticks([])


def _named(ax: Any) -> str:
    kinds = sorted({type(one).__name__ for one in np.array(ax, dtype=object).flat})
    return " and ".join(kinds) if isinstance(ax, (list, tuple, np.ndarray)) and kinds else type(ax).__name__


def _remedy(shape: tuple[int, ...]) -> str:
    return f"Make them with figure, ax = plt.subplots({', '.join(map(str, shape))})."
