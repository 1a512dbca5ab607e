"""Scores that are too many for memory: they stay on disk, and parts of them are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.gradients.memory import free_bytes
from lightning_trak.store.chunks import Chunks
from lightning_trak.store.files import Damaged

NAME = "scores"  # of the array in each chunk
_REMEDY = "Delete it, then compute the scores again with trainer.attribute(...)."


class StoredScores:
    """A matrix (n, m) on disk, which is indexed like a tensor: ``scores[i]``, ``scores[:, j]``, ``scores[2:5, :3]``.

    Only what is asked for is in memory. Each part is verified when it is read. ``masks @ scores`` works, too;
    ``np.asarray(scores)`` reads all of it.

    Args:
        chunks: of n rows, complete.
        m: the number of columns.
        factor: with which all numbers are multiplied.

    Raises:
        Damaged: on reading, if a file is missing or damaged.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     chunks = Chunks(Path(folder), "example", n=3, size=2)
    ...     chunks.write(0, {"scores": np.array([[1, 2], [3, 4]], "f4")})
    ...     chunks.write(2, {"scores": np.array([[5, 6]], "f4")})
    ...     scores = StoredScores(chunks, m=2)
    ...     scores.shape, scores[1:, 0], torch.ones(1, 3) @ scores
    (torch.Size([3, 2]), tensor([3., 5.]), tensor([[ 9., 12.]]))
    """

    ndim, dtype, device = 2, torch.float32, torch.device("cpu")

    def __init__(self, chunks: Chunks, m: int, factor: float = 1.0) -> None:
        self.chunks, self.factor = chunks, factor
        self.shape = torch.Size((chunks.n, m))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Tensor:
        """Return a part of the scores, in memory.

        Raises:
            IndexError: if both rows and columns are lists: a tensor would pair them.
        """
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        chosen = torch.arange(len(self))[rows]
        if not any(isinstance(part, (int, slice)) for part in (rows, columns)):
            raise IndexError("Of scores on disk, rows and columns cannot both be lists. Use scores[rows][:, columns].")
        wanted = chosen.reshape(-1)
        width = torch.arange(self.shape[1])[columns].shape
        found = torch.empty(len(wanted), *width)
        for start in self.chunks.fetched((wanted - wanted % self.chunks.size).unique().tolist()):
            block = self._read(self.chunks.of(start))
            here = (wanted >= start) & (wanted < start + len(block))
            found[here] = block[wanted[here] - start][:, columns]
        return found.reshape((*chosen.shape, *width))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, scores (r, m)) in order."""
        for start in self.chunks.fetched(range(0, len(self), self.chunks.size)):
            rows = self.chunks.of(start)
            yield slice(rows.start, rows.stop), self._read(rows)

    def picked(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the scores at pairs of a row and a column, (p,): what a tensor's ``scores[rows, columns]`` is."""
        found = torch.empty(len(rows))
        for start in self.chunks.fetched((rows - rows % self.chunks.size).unique().tolist()):
            block = self._read(self.chunks.of(start))
            here = (rows >= start) & (rows < start + len(block))
            found[here] = block[rows[here] - start, columns[here]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Read all scores into memory, 4 n m bytes.

        Raises:
            MemoryError: if the free memory is known, and not enough.
            ValueError: if no copy is allowed.
        """
        size, free = 4 * self.shape.numel(), free_bytes(self.device)
        if copy is False:
            raise ValueError("Scores on disk cannot be an array without a copy. Leave copy=False out.")
        if free is not None and size > free:
            raise MemoryError(
                f"All scores, {tuple(self.shape)}, take {size / 1e9:.3g} GB in memory, of which {free / 1e9:.3g} GB are"
                " free. Read parts of them: scores[rows], scores[:, columns], or scores.blocks() for one after another."
            )
        found = np.empty(self.shape, np.float32)
        for rows, block in self.blocks():
            found[rows] = block.numpy()
        return found if dtype is None else found.astype(dtype, copy=False)

    def __rmatmul__(self, left: Tensor) -> Tensor:
        """Return ``left`` (s, n) times the scores, (s, m)."""
        total = torch.zeros(len(left), self.shape[1])
        for rows, block in self.blocks():
            total += left[:, rows].float() @ block
        return total

    def __mul__(self, factor: float) -> StoredScores:
        return StoredScores(self.chunks, self.shape[1], self.factor * factor)

    def _read(self, rows: range) -> Tensor:
        try:
            array = self.chunks.read(rows, [NAME])[NAME]
        except Damaged as error:
            raise Damaged(error.path, error.why, _REMEDY) from error
        if array.dtype != np.float32 or array.shape != (len(rows), self.shape[1]):
            raise Damaged(
                self.chunks.path(rows.start), f"it has {array.dtype} {array.shape} in place of scores", _REMEDY
            )
        return torch.from_numpy(array) * self.factor

    def __repr__(self) -> str:
        return f"StoredScores(shape={tuple(self.shape)}, '{self.chunks.folder}')"


def scores_at(matrix: Tensor | StoredScores, rows: Tensor) -> Tensor:
    """Return some numbers of each column, (m, k), from a matrix (n, m): those of the rows (m, k)."""
    places = rows.flatten(), torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    found = matrix.picked(*places) if isinstance(matrix, StoredScores) else matrix[places]
    return found.view(rows.shape)
