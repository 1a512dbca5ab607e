"""The sparse projection: every parameter is added to one random bucket, with a random sign."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_trak.projection.philox import counters, philox4x32
from lightning_trak.projection.projector import Drawn, Projector

_BLOCK = 2**18  # parameters whose buckets are drawn at once


class SparseProjector(Projector):
    """One entry ±1 in every row of P, in a random column: the count sketch.

    Its cost is one addition for each gradient entry, whatever k. Row i's column and sign are drawn from Philox at
    counter (i mod 2³², i div 2³², 0, 1). Charikar, Chen, Farach-Colton, "Finding frequent items in data streams",
    ICALP 2002; Weinberger et al., "Feature hashing for large scale multitask learning", ICML 2009, for E[P Pᵀ] = I.

    >>> projector, features = SparseProjector(proj_dim=4), torch.zeros(1, 4)
    >>> projector.add_(features, torch.tensor([[2.0]]), start=7, key=0)
    >>> features.abs().sum()
    tensor(2.)
    """

    name = "sparse"

    def __init__(self, proj_dim: int = 2048) -> None:
        super().__init__(proj_dim)
        self._drawn = Drawn()

    def add_(self, features: Tensor, gradients: Tensor, start: int, key: int) -> None:
        """Add every gradient entry to its bucket; see `Projector.add_`."""
        buckets = self._signed_buckets(start, start + gradients.shape[1], key, features.device)
        signed = torch.zeros(len(gradients), 2 * self.proj_dim, dtype=features.dtype, device=features.device)
        signed.scatter_add_(1, buckets.expand(len(gradients), -1), gradients.to(features.dtype))
        features += signed[:, : self.proj_dim] - signed[:, self.proj_dim :]

    def _signed_buckets(self, start: int, stop: int, key: int, device: torch.device) -> Tensor:
        """Return the bucket of every parameter, (stop − start,); ``proj_dim`` is added where the sign is −1.

        With separate buckets for the two signs, the sketch is one scatter, without a signed copy of the gradients. The
        buckets of a model take twice the memory of its weights. They are cached, since every batch needs them.
        """

        def draw() -> Tensor:
            blocks = range(start, max(stop, start + 1), _BLOCK)  # at least one, which may be empty
            return torch.cat([_draw(first, min(first + _BLOCK, stop), self.proj_dim, key, device) for first in blocks])

        return self._drawn.get(key, (start, stop, device), draw)

    def forget(self) -> None:
        """Free the buckets."""
        self._drawn.forget()


def _draw(start: int, stop: int, proj_dim: int, key: int, device: torch.device) -> Tensor:
    low, high = counters(start, stop, device)
    zero = torch.zeros_like(low)
    bucket, sign, _, _ = philox4x32((low, high, zero, zero + 1), key)
    return ((bucket * proj_dim) >> 32) + proj_dim * (sign & 1)
