"""Which examples a loader's sampler never reads, found without changing its state: pure torch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from operator import index
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_trak.isolation.random_states import kept_generators, kept_random_states

_PASSES = 8  # over a sampler that leaves rows out, to see whether it leaves out others in another epoch
_LONGEST = 4  # times the number of examples: a pass stops there, since a sampler may be infinite


def never_read(loader: DataLoader[Any]) -> list[int]:
    """Return the rows of a loader's dataset that its sampler leaves out in every epoch.

    Rows that are left out by chance do not count, as with replacement or ``drop_last``. Nor do rows that other
    processes read. If the sampler is not one of torch's, a copy of it is iterated.

    >>> never_read(DataLoader(range(6), batch_sampler=[[0, 1], [4, 3]]))
    [2, 5]
    >>> never_read(DataLoader(range(6), batch_size=4, shuffle=True, drop_last=True))
    []
    """
    n = len(loader.dataset)  # type: ignore[arg-type]
    batches: Any = loader.batch_sampler
    plain = getattr(type(batches), "__iter__", None) is BatchSampler.__iter__
    sampler = batches.sampler if plain else batches
    known = _known(sampler)
    if known is None:
        known = _found(sampler, loader.dataset, n, in_batches=not plain)
    return sorted(set(range(n)).difference(known))


def _known(sampler: Any) -> Iterable[int] | None:
    """Return the rows that one of torch's samplers may read; None for any other sampler."""
    own = getattr(type(sampler), "__iter__", None)
    if own in (SequentialSampler.__iter__, RandomSampler.__iter__):
        return range(len(sampler.data_source))
    if own is DistributedSampler.__iter__:
        return range(len(sampler.dataset))
    if own is WeightedRandomSampler.__iter__:
        return torch.as_tensor(sampler.weights).nonzero()[:, 0].tolist()  # type: ignore[no-any-return]
    return None


def _found(sampler: Any, dataset: Any, n: int, *, in_batches: bool) -> Iterable[int]:
    """Return the rows that a sampler reads; all rows if the set changes from epoch to epoch."""
    if max(getattr(part, "num_replicas", None) or 1 for part in (sampler, getattr(sampler, "sampler", None))) > 1:
        return range(n)
    with kept_generators(dataset), kept_random_states():
        own = copy.deepcopy(sampler, {id(part): part for part in _parts_of(dataset)})
        if getattr(own, "drop_last", False):  # the last, smaller batch is read too
            with suppress(AttributeError):  # a read-only property
                own.drop_last = False
        first = _rows(own, n, in_batches)
        for epoch in range(1, _PASSES):
            if len(first) == n:
                break
            for part in (own, getattr(own, "sampler", None)):
                getattr(part, "set_epoch", lambda _: None)(epoch)
            if _rows(own, n, in_batches) != first:
                return range(n)
    return first


def _rows(sampler: Any, n: int, in_batches: bool) -> set[int]:
    """Return the rows of one pass over a sampler."""
    rows: set[int] = set()
    drawn = 0
    for batch in islice(sampler, _LONGEST * n):
        indices = [index(row) for row in (batch if in_batches else [batch])]
        rows.update(row + n if row < 0 else row for row in indices)
        drawn += len(indices)
        if len(rows) == n or drawn > _LONGEST * n:
            break
    return rows


def _parts_of(dataset: Any) -> Iterator[Any]:
    """Yield a dataset and what it holds: a sampler may hold these too, and copying it must not copy data."""
    yield dataset
    for value in getattr(dataset, "__dict__", {}).values():
        if isinstance(value, Dataset):
            yield from _parts_of(value)
        else:
            yield value
