"""Which examples are nearly the same? Sketches of features, and the nearest neighbour of each example.

How near a duplicate is, is said in `suspicion`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_trak.influence.train_features import CPU
from lightning_trak.precision import full_precision

_DIMENSION = 512  # cosines near 1 are then exact to about 0.003
_BLOCK = 2048  # rows and columns whose cosines are computed at once: 16 MiB


class Sketch:
    """Adds up short sketches of features over checkpoints, whose cosine is the mean cosine of the features.

    At each checkpoint a row is scaled to norm 1, and the entries of column c are added, with a random sign, to a random
    one of d columns ("count sketch": Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", ICALP
    2002). Signs and columns are functions of c and the checkpoint, so different checkpoints do not interfere. Inner
    products are kept on average, and errors of a cosine near 1 are small: equal rows have equal sketches.

    Args:
        n: the number of rows.
        dimension: d, a power of two.

    >>> sketch, features = Sketch(3), torch.tensor([[1.0, 2.0], [2.0, 4.0], [2.0, -1.0]])
    >>> sketch.add(slice(0, 3), features, checkpoint=0)
    >>> rows = sketch.rows()
    >>> [round(value, 2) + 0.0 for value in (rows @ rows.T)[0].tolist()]
    [1.0, 1.0, 0.0]
    """

    def __init__(self, n: int, dimension: int = _DIMENSION) -> None:
        if dimension < 1 or dimension & (dimension - 1):
            raise ValueError(f"dimension must be a power of two, got {dimension}.")
        self._rows, self._dimension = torch.zeros(n, dimension), dimension

    def add(self, rows: slice, features: Any, checkpoint: int) -> None:
        """Add the features of some rows at one checkpoint: a tensor, (r, k), or a sparse matrix of r rows.

        A row of zeros, which has no direction, adds nothing.
        """
        values = features if isinstance(features, Tensor) else features.values
        norms = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        values = values / norms.where(norms > 0, 1)
        if isinstance(features, Tensor):
            columns = torch.arange(features.shape[1], device=features.device).expand_as(features)
        else:
            columns = features.columns
        mixed = _mixed(columns, checkpoint)
        places, signs = mixed & (self._dimension - 1), 1 - 2 * ((mixed >> 40) & 1)
        found = torch.zeros(len(values), self._dimension, device=values.device)
        found.scatter_add_(1, places, (values * signs).to(found.dtype))
        self._rows[rows] += found.cpu()

    def rows(self) -> Tensor:
        """Return the sketches, scaled to norm 1, (n, d); zero where features always were."""
        norms = torch.linalg.vector_norm(self._rows, dim=1, keepdim=True)
        return self._rows / norms.where(norms > 0, 1)


def _mixed(columns: Tensor, checkpoint: int) -> Tensor:
    """Return a pseudo-random number of 63 bits for each column and checkpoint: the mixer of SplitMix64.

    Integers of 64 bits wrap around, and the shifts of negative ones are put right by masks.
    """
    stream = ((checkpoint + 1) * 0xBF58476D1CE4E5B9 + (1 << 63)) % (1 << 64) - (1 << 63)
    mixed = (columns + 1) * -7046029254386353131 + stream
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (mixed ^ ((mixed >> 31) & ((1 << 33) - 1))) & ((1 << 63) - 1)


def nearest(
    rows: Tensor,
    others: Tensor | None = None,
    advance: Callable[[int], object] = lambda _: None,
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor]:
    """Return, for each row, which other row has the largest cosine with it, and that cosine.

    No (n, m) matrix is formed: blocks of it take 16 MiB.

    Args:
        rows: of norm 1, (n, d).
        others: among which to look, of norm 1, (m, d); None for the earlier ones of ``rows``.
        advance: called with the number of rows done.
        device: where to multiply.

    Returns:
        Row numbers, (n,), −1 where there is no row to compare with; and cosines, (n,), −1 there.

    >>> rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [2.0, 0.0]]))
    >>> nearest(rows)
    (tensor([-1,  0,  1,  0]), tensor([-1.0000,  0.0000,  0.8000,  1.0000]))
    """
    n, earlier = len(rows), others is None
    among = rows if others is None else others
    indices, cosines = torch.full((n,), -1), torch.full((n,), -1.0)
    for start in range(0, n, _BLOCK):
        block = rows[start : start + _BLOCK].to(device)
        stop = start + len(block)
        for first in range(0, stop if earlier else len(among), _BLOCK):
            other = among[first : min(first + _BLOCK, stop if earlier else len(among))].to(device)
            with full_precision():
                products = block @ other.T
            if earlier and first + len(other) > start:  # only rows before each row
                mine = torch.arange(start, stop, device=device)[:, None]
                products.masked_fill_(torch.arange(first, first + len(other), device=device) >= mine, -2)
            best, where = (found.cpu() for found in products.max(1))
            better = best > cosines[start:stop]
            cosines[start:stop][better] = best[better]
            indices[start:stop][better] = where[better] + first
        advance(len(block))
    return indices, cosines.clamp(max=1)
