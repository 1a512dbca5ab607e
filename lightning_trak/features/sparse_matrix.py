"""Sparse matrices with equally many entries in every row, and their products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_TABLE = 2**26  # numbers of a dense table of sparse rows, at most
_ROWS = {"cpu": 64, "cuda": 512}  # that make a table; on a CPU few, so that the cache holds what is used often


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

    @property
    def shape(self) -> torch.Size:
        """(r, k)."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> SparseMatrix:
        """Return the matrix on a device."""
        if self.values.device == device:
            return self  # with what it knows of its columns
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

    def split(self, size: int) -> Iterator[SparseMatrix]:
        """Yield ``size`` rows at a time."""
        return map(SparseMatrix, self.columns.split(size), self.values.split(size))

    def largest(self, k: int) -> SparseMatrix:
        """Return the matrix with the k entries of each row that are largest in absolute value; all if there are fewer.

        >>> SparseMatrix(torch.tensor([[2, 0, 1]]), torch.tensor([[1.0, -5.0, 3.0]])).largest(2)
        SparseMatrix(columns=tensor([[0, 1]]), values=tensor([[-5.,  3.]]))
        """
        if k >= self.values.shape[1]:
            return self
        places = self.values.abs().topk(k, dim=1)[1]
        return SparseMatrix(self.columns.gather(1, places), self.values.gather(1, places))

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
        return Transposed(self._tables)

    def combined(self, weights: Tensor) -> Transposed:
        """Return the transpose of ``weights`` times this matrix, (m, r) times (r, p), to multiply with from the left.

        >>> one = SparseMatrix(torch.tensor([[0, 2], [1, 2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> one @ one.combined(torch.tensor([[1.0, 10.0]]))  # the row 1, 30, 42
        tensor([[ 85.],
                [258.]])
        """
        return Transposed(partial(self._combined_tables, weights))

    def _tables(self) -> Tables:
        """Yield the columns of some rows at a time, with a dense table for a few of these rows each."""
        entries = max(1, self.shape[1])
        width = max(1, min(self._width, math.isqrt(_TABLE // entries)))
        for part in self.split(max(width, _TABLE // (entries * width))):
            used = part._used()
            yield used, _filled(len(used), part._places(used), part.values, width)

    @property
    def _width(self) -> int:
        """How many columns tables have, if there is room."""
        return _ROWS.get(self.values.device.type, _ROWS["cuda"])

    def _used(self) -> Tensor:
        """Return the columns that have entries, ascending."""
        end = int(self.columns.max()) + 1 if self.columns.numel() else 0
        if end >= _TABLE:
            return self.columns.unique()
        used = torch.zeros(end, dtype=torch.bool, device=self.columns.device)
        used[self.columns.flatten()] = True
        return used.nonzero()[:, 0]

    def _combined_tables(self, weights: Tensor) -> Tables:
        """Yield all columns with entries, with some linear combinations of the rows, which hardly are sparse, each."""
        columns, starts, rows, values = self._by_column
        size = max(1, min(self._width, _TABLE // (len(columns) + 1)))
        parts = (part.T.contiguous() for part in weights.split(size))
        yield columns, (embedding_bag(rows, part, starts, mode="sum", per_sample_weights=values) for part in parts)

    def __matmul__(self, other: Transposed) -> Tensor:
        """Return the inner products of all rows with those of the other matrix, (r, m)."""
        found = []
        for columns, tables in other.tables():
            places = self._places(columns)
            found += [embedding_bag(places, table, mode="sum", per_sample_weights=self.values) for table in tables]
        return torch.cat(found, 1)

    def gram(self) -> Tensor:
        """Return the inner products of all rows with each other, (r, r): each is computed once.

        >>> SparseMatrix(torch.tensor([[2, 0], [2, 1]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])).gram()
        tensor([[ 5.,  3.],
                [ 3., 25.]])
        """
        found, start = self.values.new_empty(len(self), len(self)), 0
        for columns, tables in self._tables():
            places = self._places(columns)
            for table in tables:
                stop = start + table.shape[1]
                rest = embedding_bag(places[start:], table, mode="sum", per_sample_weights=self.values[start:])
                found[start:, start:stop], found[start:stop, start:] = rest, rest.T
                start = stop
        return found

    def _places(self, columns: Tensor) -> Tensor:
        """Return where each entry's column is among ascending ``columns``, (r, k); len(columns) where it is not."""
        count = len(columns)
        end = int(columns[-1]) + 1 if count else 0
        if end >= _TABLE:  # so many places would not fit
            places = torch.searchsorted(columns, self.columns.contiguous()).clamp(max=count - 1)
            return places.where(columns[places] == self.columns, count)
        places = torch.full((end + 1,), count, dtype=torch.int32, device=columns.device)
        places[columns] = torch.arange(count, dtype=torch.int32, device=columns.device)
        return places[self.columns.clamp(max=end)]

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The columns that have entries, where each begins among all entries in order of columns, and these entries.

        Of the entries, their rows and their values.
        """
        columns, order = self.columns.flatten().sort()
        used, counts = columns.unique_consecutive(return_counts=True)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # the last begins at the end, so it is empty
        rows = order // max(1, self.columns.shape[1])
        return used, starts.int(), rows.int(), self.values.flatten()[order]


def _filled(count: int, places: Tensor, values: Tensor, width: int) -> Iterator[Tensor]:
    """Yield a dense matrix (count + 1, ``width``) of some rows at a time, with values at their places.

    Its last row is zero. The next rows get the same memory: to fill all of it with zeros takes long if few are used.
    """
    table = values.new_zeros(count + 1, min(width, len(values)))
    for own, numbers in zip(places.split(width), values.split(width), strict=True):
        where = own, torch.arange(len(own), device=own.device)[:, None].expand_as(own)
        table[where] = numbers
        yield table[:, : len(own)].contiguous()
        table[where] = 0


Tables = Iterator[tuple[Tensor, Iterator[Tensor]]]


class Transposed(NamedTuple):
    """The transpose of a sparse matrix, or of linear combinations of its rows.

    Attributes:
        tables: yields columns that have entries, (c,), ascending, and dense matrices (c + 1, ...) of some rows or
            combinations each. The last row of a matrix is zero.
    """

    tables: Callable[[], Tables]
