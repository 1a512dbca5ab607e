"""Plots: targets beside their most helpful and most harmful training examples; curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_trak.influence import Extremes
from lightning_trak.results.kinds import described, in_words
from lightning_trak.results.numbers import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HELPFUL, _HARMFUL = "#2166ac", "#b2182b"  # blue and red that colour-blind people can tell apart


def plot_extremes(
    extremes: Extremes, columns: Sequence[int], train: Sequence[Any] | None, targets: Sequence[Any] | None
) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw one row per target; see `Attribution.plot`."""
    plt = _pyplot()
    k = extremes.top.indices.shape[1]
    if train is None:
        figure, axes = plt.subplots(len(columns), 1, figsize=(6, 0.5 + len(columns) * (0.5 + 0.36 * k)), squeeze=False)
        for axis, column in zip(axes[:, 0], columns, strict=True):
            _bars(axis, extremes, column)
        figure.tight_layout()
        return figure, axes[:, 0]
    figure, axes = plt.subplots(
        len(columns), 2 * k + 1, figsize=(1.1 * (2 * k + 1.4), 1.55 * len(columns) + 0.3), squeeze=False
    )
    for row, column in zip(axes, columns, strict=True):
        _images(row, extremes, column, train, targets)
    for first, title in ((1, "most helpful"), (k + 1, "most harmful")):
        axis = axes[0, first + (k - 1) // 2]
        axis.text(0.5, 1.62, title, transform=axis.transAxes, ha="center")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure, axes


def plot_curves(
    x: Sequence[float], panels: Mapping[str, Mapping[str, Any]], label: str
) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw curves over ``x``, one panel per quantity: {quantity: {name: values}}. The first curve is the main one."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), squeeze=False)
    for axis, (quantity, curves) in zip(axes[0], panels.items(), strict=True):
        for (name, values), colour in zip(curves.items(), (_HELPFUL, "0.55"), strict=False):
            axis.plot(x, np.asarray(values), marker="o", markersize=4, color=colour, label=name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel(label)
        axis.set_title(quantity, fontsize=10)
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure, axes[0]


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib, which is not installed: pip install matplotlib") from error
    return plt


def _bars(axis: Axes, extremes: Extremes, column: int) -> None:
    indices = [*extremes.top.indices[column].tolist(), *extremes.bottom.indices[column].tolist()[::-1]]
    values = [*extremes.top.values[column].tolist(), *extremes.bottom.values[column].tolist()[::-1]]
    places = np.arange(len(values))
    axis.barh(places, values, color=[_HELPFUL if value > 0 else _HARMFUL for value in values])
    axis.set_yticks(places, [f"train {index}" for index in indices], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(f"target {column}", fontsize=10)
    axis.set_xlabel("score", fontsize=8)


def _images(
    row: npt.NDArray[Any],
    extremes: Extremes,
    column: int,
    train: Sequence[Any],
    targets: Sequence[Any] | None,
) -> None:
    if targets is None:
        row[0].text(0.5, 0.5, f"target\n{column}", ha="center", va="center")
    else:
        image, label = _image_and_label(targets[column])
        row[0].imshow(image, cmap="gray_r")
        row[0].set_title(f"target {column}" + ("" if label is None else f"\nlabel {label}"), fontsize=8)
    k = extremes.top.indices.shape[1]
    for ranked, colour, first in ((extremes.top, _HELPFUL, 1), (extremes.bottom, _HARMFUL, k + 1)):
        for axis, index, value in zip(
            row[first : first + k], ranked.indices[column].tolist(), ranked.values[column].tolist(), strict=True
        ):
            image, label = _image_and_label(train[index])
            axis.imshow(image, cmap="gray_r")
            score = number_text(value, signed=True)
            title = score if label is None else f"label {label}\n{score}"
            axis.set_title(title, fontsize=8, color=colour)
            axis.set_xlabel(f"#{index}", fontsize=7)
    for axis in row:
        axis.set_xticks([])
        axis.set_yticks([])


def _image_and_label(example: Any) -> tuple[npt.NDArray[Any], Any]:
    """Return the image of an example in the form of matplotlib, and its label, if any."""
    found = described(example)
    if found.image is not None:
        return found.image.pixels, found.label
    if isinstance(example, (list, tuple)) and example:
        example = example[0]
    if isinstance(example, Mapping):
        raise ValueError(
            f"An example has no image: it has the keys {', '.join(map(repr, example)) or 'none'}, and none of them has"
            " one. Pass a sequence of images in place of the data, e.g. plot(train=[example['picture'] for example in"
            " data]), or call plot() without train and targets to draw scores as bars."
        )
    raise ValueError(
        f"An example ({in_words(example)}) is no image, (H, W), (C, H, W) or (H, W, C) with C = 1, 3 or 4. Pass a"
        " sequence of images in place of the data, or call plot() without train and targets to draw scores as bars."
    )
