"""Sparse features: of each example its largest entries, a record of bytes in the store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_TABLE = 2**26  # numbers of a dense table of sparse rows, at most
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

    The largest entries of k chunks are k entries. So the smallest of these is no larger than the k-th largest of all.
    """
    sizes = row.abs()
    chunk = len(row) // (k * _CHUNKS)
    if chunk < 2:
        return sizes.topk(k)[1]
    bound = sizes[: chunk * k * _CHUNKS].view(-1, chunk).amax(1).topk(k)[0][-1]
    candidates = (sizes >= bound).nonzero()[:, 0]
    return candidates[sizes[candidates].topk(k)[1]]


@dataclass(frozen=True)
class SparseMatrix:
    """A sparse matrix of r rows with k entries each.

    Attributes:
        columns: of the entries, (r, k), in every row each column once.
        values: of the entries, (r, k), float32.

    >>> one = SparseMatrix(torch.tensor([[2, 0]]), torch.tensor([[10.0, 1.0]]))
    >>> other = SparseMatrix(torch.tensor([[5, 2], [1, 0]]), torch.tensor([[7.0, 3.0], [0.0, 4.0]]))
    >>> one @ other.T
    tensor([[30.,  4.]])
    """

    columns: Tensor
    values: Tensor

    @classmethod
    def of_records(cls, records: Array) -> SparseMatrix:
        """Return what `largest_entries` returned, as a matrix."""
        values = records["values"].astype(np.float32) * records["scale"][:, None]
        return cls(torch.from_numpy(records["indices"].astype(np.int64)), torch.from_numpy(values))

    @property
    def shape(self) -> torch.Size:
        """(r, k)."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> SparseMatrix:
        """Return the matrix on a device."""
        return SparseMatrix(self.columns.to(device), self.values.to(device))

    def __mul__(self, number: float) -> SparseMatrix:
        return SparseMatrix(self.columns, self.values * number)

    def scaled(self, scales: Tensor | None) -> SparseMatrix:
        """Multiply every column with its entry of ``scales``, (p,); None for 1."""
        return self if scales is None else SparseMatrix(self.columns, self.values * scales[self.columns])

    def scaled_in_ranges(self, starts: Tensor, factors: Tensor) -> SparseMatrix:
        """Multiply the columns from each start to the next with a factor each.

        >>> matrix = SparseMatrix(torch.tensor([[2, 0]]), torch.ones(1, 2))
        >>> matrix.scaled_in_ranges(torch.tensor([0, 2]), torch.tensor([5.0, 7.0])).values
        tensor([[7., 5.]])
        """
        places = torch.searchsorted(starts, self.columns.contiguous(), right=True) - 1
        return SparseMatrix(self.columns, self.values * factors[places])

    def __getitem__(self, rows: Tensor) -> SparseMatrix:
        return SparseMatrix(self.columns[rows], self.values[rows])

    def squares(self) -> Tensor:
        """Return the squared norm of every row, (r,)."""
        return self.values.square().sum(1)

    @classmethod
    def stacked(cls, parts: Sequence[SparseMatrix]) -> SparseMatrix:
        """Return the rows of several matrices, one below the other."""
        return cls(torch.cat([part.columns for part in parts]), torch.cat([part.values for part in parts]))

    @property
    def T(self) -> Transposed:  # noqa: N802 - as a tensor has it
        """The transpose, to multiply with from the left."""
        return Transposed(self)

    def __matmul__(self, other: Transposed) -> Tensor:
        """Return the inner products of all rows with those of the other matrix, (r, m)."""
        return torch.cat([self._times(table) for table in other.tables], 1)

    def _times(self, table: tuple[Tensor, Tensor]) -> Tensor:
        """Add up rows of a table, each weighted by an entry that is in its column."""
        columns, rows = table
        places = torch.searchsorted(columns, self.columns.contiguous()).clamp(max=len(columns) - 1)
        places = places.where(columns[places] == self.columns, len(columns))  # the last row is zero
        return embedding_bag(places, rows, mode="sum", per_sample_weights=self.values)


class Transposed:
    """The transpose of a sparse matrix, as tables of the columns that have entries.

    Args:
        matrix: of m rows.
    """

    def __init__(self, matrix: SparseMatrix) -> None:
        self._matrix = matrix

    @property
    def tables(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for some of the rows at a time, their columns, (c,), and a dense matrix (c + 1, rows).

        Columns are in order; the matrix's last row is zero.
        """
        size = max(1, math.isqrt(_TABLE // max(1, self._matrix.shape[1])))
        for columns, values in zip(self._matrix.columns.split(size), self._matrix.values.split(size), strict=True):
            yield _table(columns, values)


def _table(columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    used, places = columns.unique(return_inverse=True)
    table = values.new_zeros(len(used) + 1, len(columns))
    rows = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)
    table[places, rows] = values
    return used, table


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
            yield SparseMatrix.of_records(block).scaled(self._scales)


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
