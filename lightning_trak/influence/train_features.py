"""The train set at one checkpoint: features, Q and w, read in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.influence.training_time import TrainingTime

_BLOCK_ROWS = 4096
_BLOCK_SCORES = 2**26  # the most scores at once: 256 MiB
CPU = torch.device("cpu")

Array = npt.NDArray[Any]


class Matrix(Protocol):
    """What scores need of a block of rows: a tensor, or a sparse matrix of another kind."""

    @property
    def shape(self) -> torch.Size:
        """Begins with the number of rows."""
        ...

    def to(self, device: torch.device) -> Any:
        """Return it on a device."""
        ...

    def __matmul__(self, other: Any) -> Tensor:
        """Multiply with the transpose of the targets' features."""
        ...


@runtime_checkable
class Rows(Protocol):
    """An array that is read once, in order, in blocks of rows; e.g. a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, k)."""
        ...

    def blocks(self, size: int) -> Iterator[Array | Matrix]:
        """Yield all rows in order, ``size`` at a time: arrays, or sparse matrices of another kind."""
        ...


@dataclass(frozen=True)
class TrainFeatures:
    """The train set at one checkpoint.

    Attributes:
        features: Φ, (n, k), float32: an array, or `Rows`.
        loss_grad: Q, (n,).
        curvature: w, (n,).
        training_time: how long training went on; None where that is unknown.
        logistic: whether the loss is softplus(−f), see `is_logistic`.
        n_trainable: the number of trainable parameters; 0 where that is unknown.
        squares: ‖φ‖², (n,), if φ is whitened by the curvature; else None.
        whitened_by_rest: whether that is the curvature of what the outputs leave open: see `OutputCurvature`.

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

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        n, k = self.features.shape
        return n, k

    def blocks(self, n_targets: int = 1, device: torch.device = CPU) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield (rows, Φ, Q, w) in order, in blocks so small that their features and scores take little memory."""
        size = block_size(n_targets)
        cut = self.features.blocks(size) if isinstance(self.features, Rows) else _cut(self.features, size)
        start = 0
        for block in cut:
            rows = slice(start, start + block.shape[0])
            arrays = (block, self.loss_grad[rows], self.curvature[rows])
            features, loss_grad, curvature = (_matrix(array).to(device) for array in arrays)
            yield rows, features, loss_grad, curvature
            start = rows.stop

    def rows(self, chosen: Tensor, device: torch.device = CPU) -> Any:
        """Return the features of some examples, in order; ``chosen`` are ascending row numbers."""
        parts = []
        for rows, features, *_ in self.blocks(device=device):
            here = chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start
            parts.append(features[here.to(device)])
        return stack(parts)


def _matrix(array: Array | Matrix) -> Matrix:
    return torch.from_numpy(np.asarray(array)) if isinstance(array, np.ndarray) else array


def evenly_spaced(n: int, most: int) -> Tensor:
    """Return some of n rows, evenly spaced, at most ``most``, with first and last.

    >>> evenly_spaced(9, most=3), evenly_spaced(2, most=3)
    (tensor([0, 4, 8]), tensor([0, 1]))
    """
    return torch.linspace(0, n - 1, min(n, most)).round().long()


def stack(parts: Sequence[Any]) -> Any:
    """Return blocks of rows as one: of tensors, or of sparse matrices, which know how."""
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else parts[0].stacked(parts)


def combined(rows: Any, weights: Tensor) -> Any:
    """Return the transpose of ``weights`` times rows, (m, r) times (r, k): of a tensor, or of a sparse matrix."""
    return (weights @ rows).T if isinstance(rows, Tensor) else rows.combined(weights)


def block_size(n_targets: int) -> int:
    """Return the number of training examples in a block."""
    return min(_BLOCK_ROWS, max(1, _BLOCK_SCORES // n_targets))


def n_blocks(n_train: int, n_targets: int) -> int:
    """Return the number of blocks."""
    return -(-n_train // block_size(n_targets))


def _cut(array: Array, size: int) -> Iterator[Array]:
    for start in range(0, len(array), size):
        yield array[start : start + size]
