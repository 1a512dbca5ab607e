"""What an example is made of: images, class maps, texts, tokens, numbers, series. And its label."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lightning_trak.results.examples import plain
from lightning_trak.results.numbers import number_text

Array = npt.NDArray[Any]
Scalar = str | int | float | bool | None

IMAGES, LABELS = ("image", "pixel_values", "x"), ("label", "labels", "y")  # keys of examples that are mappings
_TOKENS, _MASK = "input_ids", "attention_mask"
_OF_TOKENS = (_MASK, "token_type_ids", "special_tokens_mask", "output_mask", "labels")  # keys that go with them
_LONG = 64  # values: a longer vector of real numbers is a series, a shorter one is a row of a table
_SIDE = 8  # pixels: a matrix with a shorter side is no image
_CHANNELS = 16  # nor is one whose shorter side has at most so many,
_ELONGATED = 4  # and whose longer side is so many times that
_CLASSES = 64  # bytes with more values than that are an image, not a class map
_NAME_WORDS, _NAME_CHARACTERS = 3, 40  # a longer text is no name of a class
_FEW = 4  # numbers that are written as one label


class Image(NamedTuple):
    """An image.

    Attributes:
        pixels: (H, W), or (H, W, C) with three or four channels; bytes, or floats from 0 to 1. NaN stays.
        classes: the class of each pixel, (H, W), integers; None if there is no class map.
    """

    pixels: Array
    classes: Array | None = None


class Text(NamedTuple):
    """A text."""

    text: str


class Tokens(NamedTuple):
    """Tokens in their order: words, or the numbers of a vocabulary."""

    tokens: Sequence[str]


class Table(NamedTuple):
    """A row of a table: values by the name of the column."""

    values: Mapping[str, Scalar]


class Series(NamedTuple):
    """Curves over time, (length, channels)."""

    values: Array


class Unknown(NamedTuple):
    """What cannot be drawn, in words."""

    what: str


Part = Image | Text | Tokens | Table | Series | Unknown


@dataclass(frozen=True)
class Described:
    """An example.

    Attributes:
        parts: what it is made of, with names where the example is a mapping; otherwise names are empty.
        label: its label; None where there is none.
    """

    parts: list[tuple[str, Part]]
    label: Scalar = None

    @property
    def image(self) -> Image | None:
        """The image; of several, the one with a usual name, or else the first."""
        found = [(name, part) for name, part in self.parts if isinstance(part, Image)]
        found.sort(key=lambda item: IMAGES.index(item[0]) if item[0] in IMAGES else len(IMAGES))
        return found[0][1] if found else None


def described(example: Any) -> Described:
    """Say what an example is made of.

    - Of a pair ``(x, y)`` or a longer tuple, the first number after x is the label, or the first text of at most three
      words. What else follows is drawn, such as a caption or a second image. A mapping has its label as "label",
      "labels" or "y".
    - An image is (H, W), (C, H, W) or (H, W, C), with C = 1, 3 or 4, or an image of Pillow. Integers of the same height
      and width beside it are the classes of its pixels.
    - A text is a string. Tokens are a list of strings, or integers (t,).
    - A row of a table is a mapping of numbers and names, or a vector of at most 64 real numbers.
    - A series is a longer vector. So is a matrix (length, channels) or (channels, length) with fewer than 8 channels,
      or with at most 16 channels and at least four times as long.

    >>> described((torch.rand(1, 8, 8), 3)).label, described({"age": 37.0, "label": 1}).parts
    (3, [('', Table(values={'age': 37.0}))])
    >>> [type(part).__name__ for _, part in described((torch.rand(3, 8, 8), "a photo of a cat")).parts]
    ['Image', 'Text']
    """
    if isinstance(example, Mapping):
        key = next((key for key in LABELS if example.get(key) is not None), None)
        label = None if key is None else _label(example[key])
        rest = {name: value for name, value in example.items() if name != key or label is None}
        return Described(parts(rest), label)
    pair = isinstance(example, tuple) and len(example) == 2  # of an input and its label, maybe both of them numbers
    if pair or (isinstance(example, (list, tuple)) and len(example) > 1 and _is_nested(example)):
        first, *others = example
        labels = [_label(other) for other in others]
        label = next((label for label in labels if label is not None), None)
        drawn = [other for other, label in zip(others, labels, strict=True) if label is None]
        return Described(_as_parts([*_leaves("", first), *(leaf for one in drawn for leaf in _leaves("", one))]), label)
    return Described(parts(example))


def parts(value: Any) -> list[tuple[str, Part]]:
    """Return what a value is made of, with names; see `described`, but nothing in it is taken for a label."""
    return _as_parts(_leaves("", value))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values in mappings, tuples and dataclasses, with names. Numbers of a mapping are one `Table`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        scalars = _scalars(value)
        if scalars:
            yield name, Table(scalars)
        for key, one in _without_padding(value).items():
            if str(key) not in scalars and one is not None:
                yield from _leaves(f"{name}.{key}" if name else str(key), one)
    elif isinstance(value, (list, tuple)) and _is_nested(value):
        for one in value:
            yield from _leaves(name, one)
    elif value is not None:
        yield name, value


def _as_parts(leaves: Iterable[tuple[str, Any]]) -> list[tuple[str, Part]]:
    """Return leaves as parts; a class map goes to the image of its size. What is empty is left out, unless alone."""
    found: list[tuple[str, Part]] = []
    known = [(name, leaf, None if isinstance(leaf, (str, Table)) else as_array(leaf)) for name, leaf in leaves]
    for name, leaf, array in [one for one in known if one[2] is None or one[2].size] or known:
        classes = None if array is None else _class_map(array)
        place = next((place for place, (_, part) in enumerate(found) if _is_free(part, classes)), None)
        if place is None:
            found.append((name, _part(leaf)))
        else:
            own, image = found[place]
            found[place] = own, image._replace(classes=classes)  # type: ignore[union-attr, call-arg]
    return found


def _part(leaf: Any) -> Part:
    """Return what a value is that has no parts."""
    if isinstance(leaf, Table):
        return leaf
    if isinstance(leaf, str):
        return Text(str(leaf))
    if isinstance(leaf, (list, tuple)) and leaf and all(isinstance(one, str) for one in leaf):
        return Tokens([str(one) for one in leaf])
    if _is_number(leaf):
        return Table({"value": plain(leaf)})
    array = as_array(leaf)
    if array is None or array.size == 0:
        return Unknown(in_words(leaf))
    if array.ndim == 1:
        if array.dtype.kind in "iu":
            return Tokens([str(one) for one in array.tolist()])
        if len(array) > _LONG:
            return Series(array[:, None])
        return Table({str(place): one for place, one in enumerate(array.tolist())})
    if array.ndim == 2:
        short, long = sorted(array.shape)
        if short < _SIDE or (short <= _CHANNELS and long >= _ELONGATED * short):
            return Series(array if array.shape[0] == long else array.T)
    pixels = _pixels(array)
    return Unknown(in_words(leaf)) if pixels is None else Image(pixels)


def in_words(value: Any) -> str:
    """Return the type of a value, and its shape if it is an array.

    >>> in_words(torch.zeros(2, 3)), in_words([[1.0], [2.0, 3.0]])
    ('Tensor of shape (2, 3)', 'list')
    """
    array = as_array(value)
    shape = "" if array is None or array.ndim == 0 else f" of shape {array.shape}"
    return f"{type(value).__name__}{shape}"


def as_array(value: Any) -> Array | None:
    """Return numbers as an array; None for what is no rectangular array of numbers."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_complex():
            return None
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()  # NumPy has no bfloat16
    if getattr(value, "mode", None) in ("P", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "La", "RGBa", "RGBX"):
        value = value.convert("RGBA")  # of Pillow; the others are gray or coloured as they are
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):  # a list of arrays of different shapes, or of what is no number
        return None
    return array if array.dtype.kind in "biuf" else None


def _pixels(array: Array) -> Array | None:
    """Return an image as (H, W), or (H, W, C) with three or four channels; bytes, or floats from 0 to 1.

    Other numbers are scaled: the lowest in the image becomes 0, the highest 1.
    """
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        return None
    if array.dtype == np.uint8:
        return array
    array = array.astype(np.float64)
    finite = array[np.isfinite(array)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0 or high > 1:
        array = (array - low) / (high - low) if high > low else array * 0
    return np.where(np.isfinite(array), array, np.nan)


def _class_map(array: Array) -> Array | None:
    """Return the classes of pixels, (H, W), if that is what a value may be: few different whole numbers."""
    array = array[0] if array.ndim == 3 and array.shape[0] == 1 else array
    if array.ndim != 2 or (array.dtype.kind == "f" and not np.isin(array, (0, 1)).all()):
        return None
    few = array.dtype != np.uint8 or len(np.unique(array)) <= _CLASSES
    return array.astype(np.int64) if few else None


def _is_free(part: Part, classes: Array | None) -> bool:
    """Say whether a part is an image of the size of a class map, and has none yet."""
    if classes is None or not isinstance(part, Image) or part.classes is not None:
        return False
    return part.pixels.shape[:2] == classes.shape


def _is_nested(values: Sequence[Any]) -> bool:
    """Say whether a list or tuple has parts of its own, rather than being one vector, matrix or sentence."""
    if not values or all(_is_number(value) for value in values):
        return False
    if all(isinstance(value, str) for value in values):
        return isinstance(values, tuple)  # several texts; a list has tokens
    return isinstance(values, tuple) or as_array(values) is None


def _scalars(example: Mapping[Any, Any]) -> dict[str, Scalar]:
    """Return the numbers of a mapping, and the names among them; nothing if it has no number."""
    if not any(_is_number(value) for value in example.values()):
        return {}
    return {str(key): plain(value) for key, value in example.items() if _is_number(value) or _is_name(value)}


def _without_padding(example: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return tokens without their padding, and without what else tokenizers add."""
    tokens, mask = (as_array(example[key]) if key in example else None for key in (_TOKENS, _MASK))
    if tokens is None or tokens.ndim != 1:
        return example
    kept = tokens if mask is None or mask.shape != tokens.shape else tokens[mask != 0]
    return {key: kept if key == _TOKENS else value for key, value in example.items() if key not in _OF_TOKENS}


def _label(value: Any) -> Scalar:
    """Return a label as text or one number; None if a value is no label.

    Tags are named by their places. A few real numbers are one label.
    """
    if _is_number(value) or _is_name(value):
        return plain(value)
    array = None if isinstance(value, str) else as_array(value)
    if array is None or array.ndim > 1 or not array.size:
        return array.item() if array is not None and array.size == 1 else None
    if array.size == 1:
        return array.item()
    if array.dtype.kind in "fb" and np.isin(array, (0, 1)).all():
        return ",".join(map(str, np.flatnonzero(array))) or "none"
    if array.dtype.kind == "f" and array.size <= _FEW:
        return ", ".join(number_text(one) for one in array.tolist())
    return None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _NAME_CHARACTERS and len(value.split()) <= _NAME_WORDS


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, int, float, np.number, np.bool_)):
        return True
    return isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0 and as_array(value) is not None
