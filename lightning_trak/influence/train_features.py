"""The train set at one checkpoint: features, Q and w, read in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.influence.training_time import TrainingTime

_BLOCK_SCORES = 2**26  # the most scores at once: 256 MiB
CPU = torch.device("cpu")

Array = npt.NDArray[Any]


Matrix: TypeAlias = Any
"""A block of rows: a tensor, or a sparse matrix of another kind, with ``shape``, ``to(device)`` and ``@``."""


class Rows(Protocol):
    """An array, or what is sliced like one, e.g. a file: ``features[2:5]`` are three rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, k)."""
        ...

    def __getitem__(self, rows: slice) -> Array | Matrix:
        """Return some rows: an array, a tensor, or a sparse matrix of another kind."""
        ...


@dataclass(frozen=True)
class TrainFeatures:
    """The train set at one checkpoint.

    Attributes:
        features: Φ, (n, k), float32: an array, or `Rows` that are read when they are needed.
        loss_grad: Q, (n,).
        curvature: w, (n,).
        training_time: how long training went on; None where that is unknown.
        logistic: whether the loss is softplus(−f), see `is_logistic`.
        n_trainable: the number of trainable parameters; 0 where that is unknown.
        squares: ‖φ‖², (n,), if φ is whitened by the curvature; else None.
        whitened_by_rest: whether that is the curvature of what the outputs leave open: see `OutputCurvature`.
        block_rows: how many rows are read at once, at most.

    Arrays must be writable, or memory-mapped copy-on-write (``mmap_mode="c"``): else torch cannot read them in place.
    """

    features: Array | Rows
    loss_grad: Array
    curvature: Array
    training_time: TrainingTime | None = None
    logistic: bool = False
    n_trainable: int = 0
    squares: Array | None = None
    whitened_by_rest: bool = False
    block_rows: int = 2048  # of 2048 features 16 MiB; memory for more than 32 MiB is new each time, and slow

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        n, k = self.features.shape
        return n, k

    def blocks(self, n_targets: int = 1, device: torch.device = CPU) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield (rows, Φ, Q, w) in order, in blocks so small that their features and scores take little memory."""
        for rows in self.slices(n_targets):
            yield rows, *self.block(rows, device)

    def slices(self, n_targets: int = 1, rows: range | None = None) -> list[slice]:
        """Return the rows of every block, in order: of all rows, or of a range of them."""
        rows = range(self.shape[0]) if rows is None else rows
        size = min(self.block_rows, max(1, _BLOCK_SCORES // n_targets))
        return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]

    def block(self, rows: slice, device: torch.device = CPU) -> tuple[Any, Tensor, Tensor]:
        """Return Φ, Q and w of some rows."""
        arrays = (self.features[rows], self.loss_grad[rows], self.curvature[rows])
        blocks = (torch.from_numpy(np.asarray(one)) if isinstance(one, np.ndarray) else one for one in arrays)
        features, loss_grad, curvature = (block.to(device) for block in blocks)
        return features, loss_grad, curvature

    def rows(self, chosen: Tensor, device: torch.device = CPU) -> Any:
        """Return the features of some examples, in order; ``chosen`` are ascending row numbers."""
        parts = []
        for rows in self.slices():
            here = chosen[(chosen >= rows.start) & (chosen < rows.stop)]
            if len(here):  # of a block, what is before and after them is not read
                first = int(here[0])
                features, *_ = self.block(slice(first, int(here[-1]) + 1), device)
                parts.append(features[(here - first).to(device)])
        return stack(parts) if parts else self.block(slice(1), device)[0][chosen.to(device)]


def evenly_spaced(n: int, most: int) -> Tensor:
    """Return some of n rows, evenly spaced, at most ``most``, with first and last.

    >>> evenly_spaced(9, most=3), evenly_spaced(2, most=3)
    (tensor([0, 4, 8]), tensor([0, 1]))
    """
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long()


def stack(parts: Sequence[Any]) -> Any:
    """Return blocks of rows as one: of tensors, or of sparse matrices, which know how."""
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else parts[0].stacked(parts)


def combined(rows: Any, weights: Tensor) -> Any:
    """Return the transpose of ``weights`` times rows, (m, r) times (r, k): of a tensor, or of a sparse matrix."""
    return (weights @ rows).T if isinstance(rows, Tensor) else rows.combined(weights)


def gram(rows: Any) -> Tensor:
    """Return the inner products of all rows with each other, (r, r): of a tensor, or of a sparse matrix."""
    return rows @ rows.T if isinstance(rows, Tensor) else rows.gram()  # type: ignore[no-any-return]
