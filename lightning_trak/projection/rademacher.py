"""The dense projection: independent random signs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_trak.projection.philox import random_signs
from lightning_trak.projection.projector import Projector

_BLOCK_ENTRIES = 2**22  # entries of P that exist at once: 16 MiB of float32


class RademacherProjector(Projector):
    """P[i, j] = ±1/√k, independent and equally likely.

    Column j of row i is bit j mod 128 of Philox's four words at counter (i mod 2³², i div 2³², j div 128, 0), so P is
    the same matrix for every chunking, batch and device. It is drawn in blocks of rows that are used and forgotten.
    Achlioptas, "Database-friendly random projections", PODS 2001.

    >>> projector, features = RademacherProjector(proj_dim=4), torch.zeros(1, 4)
    >>> projector.add_(features, torch.tensor([[2.0]]), start=7, key=0)
    >>> features.abs()
    tensor([[1., 1., 1., 1.]])
    """

    name = "rademacher"

    def add_(self, features: Tensor, gradients: Tensor, start: int, key: int) -> None:
        """Add the block's projection by one GEMM a block of rows; see `Projector.add_`."""
        rows = max(1, _BLOCK_ENTRIES // self.proj_dim)
        for first in range(0, gradients.shape[1], rows):
            block = gradients[:, first : first + rows].to(features.dtype)
            signs = self.signs(start + first, start + first + block.shape[1], key, features.device)
            features.addmm_(block, signs.to(features.dtype), alpha=self.proj_dim**-0.5)

    def signs(self, start: int, stop: int, key: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw √k·P[start:stop], of shape (stop − start, k): entries ±1, float32."""
        return random_signs(start, stop, self.proj_dim, key, 0, torch.device(device))
