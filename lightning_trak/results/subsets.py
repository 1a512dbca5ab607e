"""Which training examples: by rows, masks or ids; and the train set with or without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_trak.data.annotations import annotations_of
from lightning_trak.results.examples import Examples


def kept_subset(train_set: Any, examples: Examples, rows: Any, ids: Any, *, remove: bool = False) -> Subset[Any]:
    """Return a train set with the chosen examples alone or, with ``remove``, without them; see `Attribution.remove`."""
    n = len(examples)
    if not hasattr(train_set, "__getitem__") or not hasattr(train_set, "__len__"):
        raise TypeError(f"train_set must be the data set that was attributed, got {type(train_set).__name__}.")
    if len(train_set) != n:
        raise ValueError(
            f"train_set has {len(train_set)} examples, and the attribution is of {n}. Pass the data set that was"
            " attributed: the rows of another are other examples."
        )
    if (rows is None) == (ids is None):
        raise TypeError("Choose training examples by rows, or by ids=[...]: one of the two.")
    _check_same(annotations_of(train_set).ids, examples.ids)
    mask = _one_mask(examples.rows_of(ids) if rows is None else rows, n, "rows")
    left = ~mask if remove else mask
    if not left.any():
        raise ValueError("No training example is left, so there is nothing to train on. Keep some.")
    return Subset(train_set, left.nonzero()[:, 0].tolist())


def _check_same(told: Sequence[str | int] | None, known: Sequence[str | int]) -> None:
    """Raise a ValueError if a data set tells the same texts as ids, but for other rows; a user may have renamed all."""
    if told is None or not all(isinstance(one, str) for one in told) or set(told).isdisjoint(known):
        return
    for row, (one, other) in enumerate(zip(told, known, strict=True)):
        if one != other:
            raise ValueError(
                f"train_set is not in the order in which it was attributed, or has other examples: row {row} is"
                f" {one!r}, and was {other!r}. Pass the data set that was attributed; a random split needs a seed."
            )


def masks_of(indices: Any, n: int) -> Tensor:
    """Return sets of training examples to leave out as masks, (n,) or (s, n).

    Args:
        indices: rows of the train set, (r,); or masks, (n,) or (s, n), bool.
        n: the number of training examples.

    Raises:
        TypeError, ValueError: if a row is not in the train set, or no training example is left.

    >>> masks_of([0, 2], 4)
    tensor([ True, False,  True, False])
    """
    masks = _mask(indices, n, "indices")
    if bool(masks.all(-1).any()):
        raise ValueError("All training examples are left out, so nothing is left to train on. Leave out fewer.")
    return masks


def rows_of(chosen: Any, examples: Examples, name: str) -> list[int]:
    """Return rows of the train set in their order, from rows, a mask, (n,), or ids that are text.

    >>> rows_of(["b"], Examples(["a", "b"]), "marked"), rows_of([False, True], Examples(2), "marked")
    ([1], [1])
    """
    listed = chosen if hasattr(chosen, "tolist") or isinstance(chosen, str) else list(chosen)
    if isinstance(listed, str) or (isinstance(listed, list) and any(isinstance(one, str) for one in listed)):
        return sorted(set(examples.rows_of(listed)))
    return [int(row) for row in _one_mask(listed, len(examples), name).nonzero()[:, 0]]


def _one_mask(indices: Any, n: int, name: str) -> Tensor:
    mask = _mask(indices, n, name)
    if mask.ndim != 1:
        raise ValueError(f"{name} must be one mask, ({n},), got {tuple(mask.shape)}.")
    return mask


def _mask(indices: Any, n: int, name: str) -> Tensor:
    """Return sets of training examples as masks, (n,) or (s, n), from rows or masks."""
    listed = indices.tolist() if hasattr(indices, "tolist") and not isinstance(indices, Tensor) else indices
    if isinstance(listed, str) or (isinstance(listed, list) and any(isinstance(row, str) for row in listed)):
        raise TypeError(
            f"{name} must be rows of the train set, integers, or a mask, got text. Ids are passed as ids=[...]."
        )
    given = torch.as_tensor(listed).cpu()
    given = given.long() if given.shape == (0,) else given  # an empty list is a tensor of floats
    if given.dtype == torch.bool:
        if given.ndim not in (1, 2) or given.shape[-1] != n:
            raise ValueError(
                f"A mask must have shape ({n},) or (s, {n}) for {n} training examples: {tuple(given.shape)}."
            )
        return given
    if given.ndim != 1 or given.dtype.is_floating_point or given.dtype.is_complex:
        raise ValueError(
            f"{name} must be rows of the train set, (r,), integers; got {tuple(given.shape)}, {given.dtype}."
        )
    outside = given[(given < 0) | (given >= n)]
    if len(outside):
        raise ValueError(f"{name} must be rows of the train set, 0 to {n - 1}; got {outside[:5].tolist()}.")
    return torch.zeros(n, dtype=torch.bool).index_fill(0, given.long(), True)
