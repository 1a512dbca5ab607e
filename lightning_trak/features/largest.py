"""Sparse features: of each example its largest entries, as arrays for the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.features.sparse_matrix import SparseMatrix

_CHUNKS = 16  # for each entry that is kept: more give a closer bound

Array = npt.NDArray[Any]


def entry_bytes(k: int, dimension: int) -> int:
    """Return how many bytes `largest_entries` makes of an example.

    >>> entry_bytes(256, dimension=10**6)
    1544
    """
    return k * (_index_type(dimension)().itemsize + 2) + 8


def _index_type(dimension: int) -> type[np.signedinteger[Any]]:
    return np.int32 if dimension < 2**31 else np.int64


def largest_entries(features: Tensor, k: int) -> dict[str, Array]:
    """Return each example's own k entries of largest absolute value.

    Args:
        features: φ, (b, p).
        k: at most p.

    Returns:
        ``indices`` and ``values``, (b, k), where values are float16, relative to the largest; that is the ``scale``,
        (b,); and ``squares``, ‖φ‖² of all entries, (b,).

    >>> kept = largest_entries(torch.tensor([[0.5, -4.0, 2.0]]), 2)
    >>> kept["indices"], kept["values"] * kept["scale"]
    (array([[1, 2]], dtype=int32), array([[-4.,  2.]], dtype=float32))
    """
    indices = torch.stack([_largest(row, k) for row in features]) if len(features) else torch.zeros(0, k).long()
    values = features.gather(1, indices)
    scale = values.abs().amax(1)
    return {
        "indices": indices.cpu().numpy().astype(_index_type(features.shape[1])),
        "values": (values / scale.where(scale > 0, 1)[:, None]).half().cpu().numpy(),
        "scale": scale.float().cpu().numpy(),
        "squares": torch.linalg.vector_norm(features, dim=1).square().float().cpu().numpy(),
    }


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


ENTRIES = ("indices", "values", "scale")  # what a sparse matrix is made of


def matrix_of(entries: Mapping[str, Array]) -> SparseMatrix:
    """Return what `largest_entries` returned as a matrix."""
    values = entries["values"].astype(np.float32) * entries["scale"][:, None]
    return SparseMatrix(torch.from_numpy(entries["indices"].astype(np.int64)), torch.from_numpy(values))


class SparseRows:
    """The largest entries of n examples as a sparse matrix, of which parts are read.

    Args:
        read: returns the `ENTRIES` of a range of rows.
        shape: (n, p).
        scales: to multiply columns with, (p,); None for 1.
    """

    def __init__(
        self, read: Callable[[range], Mapping[str, Array]], shape: tuple[int, int], scales: Tensor | None = None
    ) -> None:
        self._read, self.shape, self._scales = read, shape, scales

    def __getitem__(self, rows: slice) -> SparseMatrix:
        """Return some rows."""
        return matrix_of(self._read(range(*rows.indices(self.shape[0])))).scaled(self._scales)


def difference(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """Return the relative distance of the entries of examples: ‖φ − φ'‖ / ‖φ'‖, over all examples.

    >>> kept = largest_entries(torch.tensor([[0.5, -4.0, 2.0]]), 2)
    >>> difference(kept, kept)
    0.0
    """
    apart = total = 0.0
    for (mine, values), (others, theirs) in zip(_entries(one), _entries(other), strict=True):
        entries: dict[int, float] = dict(zip(others, theirs, strict=True))
        total += sum(value**2 for value in entries.values())
        for index, value in zip(mine, values, strict=True):
            entries[index] = entries.get(index, 0.0) - value
        apart += sum(value**2 for value in entries.values())
    return float((apart / total) ** 0.5) if total else float(apart > 0)


def _entries(kept: Mapping[str, Array]) -> Iterator[tuple[list[int], list[float]]]:
    """Yield indices and values of each example."""
    values = kept["values"].astype(np.float64) * kept["scale"][:, None]
    yield from zip(kept["indices"].tolist(), values.tolist(), strict=True)
