"""Plots: targets beside their most helpful and most harmful training examples; curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_trak.influence import Extremes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_IMAGES, _LABELS = ("image", "pixel_values", "x"), ("label", "labels", "y")  # keys of examples that are mappings
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
            title = f"{value:+.2g}" if label is None else f"label {label}\n{value:+.2g}"
            axis.set_title(title, fontsize=8, color=colour)
            axis.set_xlabel(f"#{index}", fontsize=7)
    for axis in row:
        axis.set_xticks([])
        axis.set_yticks([])


def _image_of(example: Mapping[Any, Any]) -> Any:
    for key in _IMAGES:
        if key in example:
            return example[key]
    raise ValueError(
        f"An example has no image: it has the keys {', '.join(map(repr, example)) or 'none'}, and its image is expected"
        f" under one of {', '.join(map(repr, _IMAGES))}. Pass a sequence of images in place of the data, e.g."
        " plot(train=[example['picture'] for example in data]), or call plot() without train and targets to draw scores"
        " as bars."
    )


def _image_and_label(example: Any) -> tuple[npt.NDArray[Any], Any]:
    """Return the image of an example in the form of matplotlib, and its label, if any."""
    image, label = example, None
    if isinstance(example, Mapping):
        label = next((example[key] for key in _LABELS if key in example), None)
    elif isinstance(example, (list, tuple)) and example:
        image, label = example[0], example[1] if len(example) > 1 else None
    if isinstance(label, (torch.Tensor, np.generic, np.ndarray)):
        label = label.item() if np.asarray(label).size == 1 else None  # tokens, for example
    elif isinstance(label, (Mapping, list, tuple)):
        label = None
    return _as_matplotlib_wants(_image_of(image) if isinstance(image, Mapping) else image), label


def _as_matplotlib_wants(image: Any) -> npt.NDArray[Any]:
    """Return an image as (H, W), or (H, W, C) with three or four channels; floats from 0 to 1."""
    try:
        array = np.asarray(image)
    except ValueError:  # a list of arrays of different shapes
        array = np.empty(0, dtype=object)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.dtype.kind not in "biuf":
        shape = "" if array.dtype == object else f" of shape {array.shape}"
        raise ValueError(
            f"An example{shape} ({type(image).__name__}) is no image, (H, W), (C, H, W) or (H, W, C) with C = 1, 3 or"
            " 4. Pass a sequence of images in place of the data, or call plot() without train and targets to draw"
            " scores as bars."
        )
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        array = (array - low) / (high - low) if high > low else np.zeros_like(array)
    return array
