"""Sparse features: of each example its largest entries, a record of bytes in the store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.features.sparse_matrix import SparseMatrix

_CHUNKS = 16  # for each entry that is kept: more give a closer bound

Array = npt.NDArray[Any]


class Records(Protocol):
    """Records that are read once, in order, in blocks; e.g. a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n,)."""
        ...

    def blocks(self, size: int) -> Iterator[Array]:
        """Yield all records in order, ``size`` at a time."""
        ...


def record_type(k: int, dimension: int) -> np.dtype[Any]:
    """Return the type of an example's record: k indices and values, their scale, and ‖φ‖² of all entries.

    Values are float16, relative to the largest, which is the scale.

    >>> record_type(256, dimension=10**6).itemsize
    1544
    """
    index = np.int32 if dimension < 2**31 else np.int64
    numbers = [("squares", np.float32), ("scale", np.float32)]
    return np.dtype([*numbers, ("indices", index, (k,)), ("values", np.float16, (k,))])


def largest_entries(features: Tensor, k: int) -> Array:
    """Return the records of examples, (b,): each example's own k entries of largest absolute value.

    Args:
        features: φ, (b, p).
        k: at most p.

    >>> record = largest_entries(torch.tensor([[0.5, -4.0, 2.0]]), 2)
    >>> record["indices"], record["values"] * record["scale"]
    (array([[1, 2]], dtype=int32), array([[-4.,  2.]], dtype=float32))
    """
    records: Array = np.zeros(len(features), record_type(k, features.shape[1]))
    indices = torch.stack([_largest(row, k) for row in features]) if len(features) else torch.zeros(0, k).long()
    values = features.gather(1, indices)
    scale = values.abs().amax(1)
    records["squares"] = torch.linalg.vector_norm(features, dim=1).square().cpu().numpy()
    records["scale"] = scale.cpu().numpy()
    records["indices"] = indices.cpu().numpy()
    records["values"] = (values / scale.where(scale > 0, 1)[:, None]).cpu().numpy()
    return records


def _largest(row: Tensor, k: int) -> Tensor:
    """Return the indices of the k entries of largest absolute value, (k,); faster than ``topk`` of a long row.

    The largest entries of k chunks are k entries. So the smallest of these is no larger than the k-th largest of all,
    and the other chunks need no second look.
    """
    chunk = len(row) // (k * _CHUNKS)
    if chunk < 2:
        return row.abs().topk(k)[1]
    chunks = row[: chunk * k * _CHUNKS].view(-1, chunk)
    largest = chunks.abs().amax(1)
    bound = largest.topk(k)[0][-1]
    chosen = (largest >= bound).nonzero()[:, 0]
    numbers, places = (chunks[chosen].abs() >= bound).nonzero(as_tuple=True)
    rest = (row[chunks.numel() :].abs() >= bound).nonzero()[:, 0] + chunks.numel()
    candidates = torch.cat([chosen[numbers] * chunk + places, rest])
    return candidates[row[candidates].abs().topk(k)[1]]


def matrix_of(records: Array) -> SparseMatrix:
    """Return what `largest_entries` returned as a matrix."""
    values = records["values"].astype(np.float32) * records["scale"][:, None]
    return SparseMatrix(torch.from_numpy(records["indices"].astype(np.int64)), torch.from_numpy(values))


class SparseRows:
    """Records as rows of a sparse matrix, read in order.

    Args:
        records: of n examples.
        dimension: p, the number of columns.
        scales: to multiply columns with, (p,); None for 1.
    """

    def __init__(self, records: Records, dimension: int, scales: Tensor | None = None) -> None:
        self._records, self._dimension, self._scales = records, dimension, scales

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        return self._records.shape[0], self._dimension

    def blocks(self, size: int) -> Iterator[SparseMatrix]:
        """Yield all rows in order, ``size`` at a time."""
        for block in self._records.blocks(size):
            matrix = matrix_of(block)  # a damaged column may be any number; the records' checksum tells afterwards
            matrix = SparseMatrix(matrix.columns.clamp(0, self._dimension - 1), matrix.values)
            yield matrix.scaled(self._scales)


def difference(one: Array, other: Array) -> float:
    """Return the relative distance of two arrays of records: ‖φ − φ'‖ / ‖φ'‖ of their entries, over all examples.

    >>> record = largest_entries(torch.tensor([[0.5, -4.0, 2.0]]), 2)
    >>> difference(record, record)
    0.0
    """
    apart = total = 0.0
    for mine, others in zip(one, other, strict=True):
        entries: dict[int, float] = dict(zip(others["indices"].tolist(), _values(others), strict=True))
        total += sum(value**2 for value in entries.values())
        for index, value in zip(mine["indices"].tolist(), _values(mine), strict=True):
            entries[index] = entries.get(index, 0.0) - value
        apart += sum(value**2 for value in entries.values())
    return float((apart / total) ** 0.5) if total else float(apart > 0)


def _values(record: Any) -> list[float]:
    return (record["values"].astype(np.float64) * record["scale"]).tolist()  # type: ignore[no-any-return]
