"""Ids and labels that a data set tells of its examples without reading them."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset, Subset, TensorDataset

_IDS, _LABELS = ("id", "idx", "guid", "path"), ("label", "labels")  # columns of Hugging Face's data sets
_SCALARS = re.compile(r"(u?int\d*|float\d*|double|bool|(large_)?string)\b")  # their types that are no images or lists
_FILE = re.compile(r"[^\n]*\S\.\w{1,8}")  # a text that is no path hardly ends like that in every row
_NO_LABEL = -1  # by the convention of Hugging Face and torchvision

Label = str | int | float | bool | None


class Annotations(NamedTuple):
    """What a data set tells of its examples.

    Attributes:
        ids: one for each row, text or integers; None if it tells none.
        labels: one for each row, by name where classes have names; None if it tells none.
        classes: the names of the classes that its examples hold by number; None if it tells none.
    """

    ids: Sequence[str | int] | None = None
    labels: Sequence[Label] | None = None
    classes: Sequence[str] | None = None


def annotations_of(dataset: Any) -> Annotations:
    """Return what a data set tells of its examples, none of which is read.

    Understood are torch's ``Subset``, ``ConcatDataset`` and ``TensorDataset``, whose last tensor are labels if it is
    (n,) and of integers; Hugging Face's ``Dataset`` with a column "id", "idx", "guid" or "path", and "label" or
    "labels"; and data sets such as those of torchvision, with attributes ``samples`` or ``imgs`` (pairs of a path and a
    class), ``targets`` or ``labels``, and ``classes``. Properties of these names are not called: they may read the
    examples.

    >>> import torch
    >>> whole = TensorDataset(torch.zeros(4, 2), torch.tensor([5, 6, 7, 8]))
    >>> annotations_of(Subset(whole, [3, 0])).labels
    (8, 5)
    """
    n = len(dataset)
    if isinstance(dataset, Subset):
        return _of_subset(dataset, n)
    if isinstance(dataset, ConcatDataset):
        return _joined([annotations_of(part) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset):
        *inputs, last = dataset.tensors
        return Annotations(labels=_column(last, n, int) if inputs else None)
    if all(inspect.getattr_static(dataset, name, None) is not None for name in ("column_names", "features")):
        names, features = dataset.column_names, dataset.features
        if isinstance(names, list) and isinstance(features, Mapping):
            return _of_columns(dataset, names, features, n)
    return _of_attributes(dataset, n)


def named(labels: Sequence[Any], classes: Sequence[str] | None) -> Sequence[Any]:
    """Return the names of classes in place of their numbers, and None for −1; as given if some number has no name.

    >>> named([1, 0, -1], ["cat", "dog"]), named([1, 2], ["cat", "dog"])
    (('dog', 'cat', None), [1, 2])
    """
    if classes is None or not all(type(label) is int and _NO_LABEL <= label < len(classes) for label in labels):
        return labels
    return tuple(None if label == _NO_LABEL else classes[label] for label in labels)


def _of_subset(dataset: Subset[Any], n: int) -> Annotations:
    whole, rows = annotations_of(dataset.dataset), _column(dataset.indices, n, int)
    if rows is None:
        return Annotations()
    ids, labels = (None if known is None else tuple(known[row] for row in rows) for known in whole[:2])
    return Annotations(ids, labels, whole.classes)


def _joined(parts: Sequence[Annotations]) -> Annotations:
    """Return what is known of all parts."""

    def join(columns: Iterable[Sequence[Any] | None]) -> tuple[Any, ...] | None:
        found = [column for column in columns if column is not None]
        return tuple(value for column in found for value in column) if len(found) == len(parts) else None

    same = all(part.classes == parts[0].classes for part in parts)
    ids, labels = (join(part[place] for part in parts) for place in (0, 1))
    return Annotations(ids, labels, parts[0].classes if same else None)


def _of_columns(dataset: Any, columns: Sequence[str], features: Mapping[Any, Any], n: int) -> Annotations:
    """Return what a Hugging Face data set tells; columns of other types than text and numbers are not read."""
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset

    def read(names: Iterable[str], *kinds: type) -> tuple[str | None, tuple[Any, ...] | None]:
        for name in names:
            feature = features.get(name)
            if name in columns and _SCALARS.match(str(getattr(feature, "dtype", ""))):
                found = _column(plain[name][:], n, *kinds)
                if found is not None:
                    return name, found
        return None, None

    ids, (name, labels) = read(_IDS, int, str)[1], read(_LABELS, int, float, bool, str)
    classes = None if name is None else _names(getattr(features[name], "names", None))
    return Annotations(ids, _by_name(labels, classes), classes)


def _of_attributes(dataset: Any, n: int) -> Annotations:
    """Return what a data set like those of torchvision tells."""

    def attribute(name: str) -> Any:
        return inspect.getattr_static(dataset, name, None)

    pairs = next(filter(None, (_pairs(attribute(name), n) for name in ("samples", "imgs"))), None)
    ids = None if pairs is None else _paths(first for first, _ in pairs)
    columns: list[tuple[Any, tuple[type, ...]]] = [
        (attribute("targets"), (int, float, bool)),  # text may be paths, e.g. of masks
        (attribute("labels"), (int, float, bool, str)),
        (pairs and [second for _, second in pairs], (int,)),
    ]
    labels = next(filter(None, (_column(values, n, *kinds) for values, kinds in columns)), None)
    classes = _names(attribute("classes"))
    raw = attribute("target_transform") is None  # else an example has another number than the data set
    return Annotations(ids, _by_name(labels, classes), classes if raw else None)


def _by_name(labels: Sequence[Any] | None, classes: Sequence[str] | None) -> Sequence[Label] | None:
    """Return labels by name; None if no example has one."""
    found = () if labels is None else named(labels, classes)
    return found if any(label is not None for label in found) else None


def _column(values: Any, n: int, *kinds: type) -> tuple[Any, ...] | None:
    """Return one value for each row, in Python's own types; None unless all are of the kinds asked for."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)) or len(values) != n:
        return None
    found = tuple(value.item() if getattr(value, "shape", None) == () else value for value in values)
    return found if all(type(value) in kinds for value in found) else None


def _pairs(values: Any, n: int) -> Sequence[tuple[Any, Any]] | None:
    is_list = isinstance(values, (list, tuple)) and len(values) == n
    return values if is_list and all(isinstance(one, (list, tuple)) and len(one) == 2 for one in values) else None


def _paths(values: Iterable[Any]) -> tuple[str, ...] | None:
    found = [os.fspath(value) if isinstance(value, (str, os.PathLike)) else value for value in values]
    return tuple(found) if all(isinstance(value, str) and _FILE.fullmatch(value) for value in found) else None


def _names(values: Any) -> tuple[str, ...] | None:
    """Return names of classes; of several names of a class, all."""
    if not isinstance(values, (list, tuple)) or not values:
        return None
    found = [", ".join(map(str, name)) if isinstance(name, tuple) else name for name in values]
    return tuple(found) if all(isinstance(name, str) for name in found) else None
