"""Curves of what an evaluation found: convergence, self-influence, the LDS, retraining without examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_trak.results.numbers import number_text
from lightning_trak.results.plots.axes import HELPFUL, MARKED, OTHER, axes_of_shape, one_axes, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = 5.0, 3.2  # inches


def plot_curves(
    x: Sequence[float], panels: Mapping[str, Mapping[str, Any]], label: str, ax: Any
) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw curves over ``x``, one panel per quantity: {quantity: {name: values}}. The first curve is the main one."""
    plt = pyplot()
    if ax is None:
        figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), squeeze=False, layout="constrained")
        axes = axes[0]
    else:
        figure, axes = axes_of_shape(ax, (len(panels),), f"for {' and '.join(panels)}")
    for axis, (quantity, curves) in zip(axes, panels.items(), strict=True):
        for (name, values), colour in zip(curves.items(), (HELPFUL, OTHER), strict=False):
            axis.plot(x, np.asarray(values), marker="o", markersize=4, color=colour, label=name)
        axis.axhline(0, color="black", linewidth=0.8, zorder=0)
        axis.set(xlabel=label, ylabel=quantity)
    axes[0].legend(frameon=False, fontsize=9)
    return figure, axes


def plot_convergence(checkpoints: Sequence[int], agreement: Sequence[float], ax: Any) -> tuple[Figure, Axes]:
    """Draw how well halves of the checkpoints agree; see `Convergence.plot`."""
    figure, axis = one_axes(ax, _SIZE)
    axis.plot(checkpoints, agreement, marker="o", markersize=4, color=HELPFUL)
    axis.set_xticks(checkpoints[:: 1 + len(checkpoints) // 12])
    axis.set_ylim(min([0.0, *agreement]) - 0.05, 1.02)
    axis.set(xlabel="checkpoints", ylabel="rank correlation of two halves")
    return figure, axis


def plot_self_influence(values: Any, marked: Sequence[int], name: str, ax: Any) -> tuple[Figure, Axes]:
    """Draw self-influences, the highest first, (n,); those of some rows as dots with a name; see `Suspects.plot`."""
    figure, axis = one_axes(ax, _SIZE)
    values = np.asarray(values)
    order = np.argsort(-values, kind="stable")
    ranks = np.empty(len(order), dtype=int)
    ranks[order] = np.arange(1, len(order) + 1)
    axis.plot(np.arange(1, len(order) + 1), values[order], color=OTHER, linewidth=1.5, label="all training examples")
    if marked:
        label = f"{name} ({number_text(len(marked))})"
        rows = list(marked)
        axis.plot(
            ranks[rows],
            values[rows],
            "o",
            markersize=5,
            color=MARKED,
            markeredgecolor="black",
            markeredgewidth=0.5,
            label=label,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda rank, place: number_text(round(rank)) if rank >= 1 else "")
    axis.set(xlabel="training examples, by rank", ylabel="self-influence (in units of the loss)")
    axis.legend(frameon=False, fontsize=9)
    return figure, axis


def plot_lds(
    lds: float, interval: tuple[float, float], ceiling: float | None, random: float, per_target: Any, ax: Any
) -> tuple[Figure, Axes]:
    """Draw the LDS of every target, (m,), and their mean; see `Evaluation.plot`."""
    figure, axis = one_axes(ax, _SIZE)
    values = np.sort(np.asarray(per_target))[::-1]
    axis.plot(np.arange(1, len(values) + 1), values, "o", markersize=3, color=OTHER, label="each target")
    lower, upper = map(number_text, interval)
    axis.axhspan(*interval, color=HELPFUL, alpha=0.2, linewidth=0)
    axis.axhline(lds, color=HELPFUL, label=f"mean {number_text(lds)} (95 %: {lower} to {upper})")
    if ceiling is not None:
        axis.axhline(ceiling, color="black", linestyle="--", label=f"noise ceiling {number_text(ceiling)}")
    axis.axhline(random, color="black", linestyle=":", label=f"random scores {number_text(random)}")
    axis.set(xlabel="targets, by rank", ylabel="LDS (rank correlation)")
    axis.legend(frameon=False, fontsize=8, ncols=2, columnspacing=1, loc="lower left", bbox_to_anchor=(0, 1))
    return figure, axis
