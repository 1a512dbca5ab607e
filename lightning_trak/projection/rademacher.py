"""The dense projection: independent random signs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_trak.precision import full_precision
from lightning_trak.projection import triton_kernel
from lightning_trak.projection.philox import random_signs, random_words, signs_of
from lightning_trak.projection.projector import Projector
from lightning_trak.projection.sparse import SparseProjector

_STREAM = 0  # fourth word of the Philox counter
_DRAWN = 2**24  # entries of P whose bits are drawn at once: enough to keep all cores busy
_BLOCK_ENTRIES = 2**20  # entries of P that exist at once: 4 MiB of float32, which stay in the cache


class RademacherProjector(Projector):
    """P[i, j] = ±1/√k, independent and equally likely.

    Column j of row i is bit j mod 128 of Philox's four words at counter (i mod 2³², i div 2³², j div 128, 0). So P is
    the same matrix for every chunking, batch and device. Blocks of rows are drawn once for each batch, used, and
    discarded: the larger the batch, the less an example costs. Achlioptas, "Database-friendly random projections",
    PODS 2001.

    Products have float32 precision on every machine: a row of features differs from the exact one by less than 1e-4 of
    its norm. GPUs from Ampere on, with Triton, draw and multiply in one kernel; see `triton_kernel`. On CPUs bfloat16
    is not used, since they would round the products to it.

    >>> projector, features = RademacherProjector(proj_dim=4), torch.zeros(1, 4)
    >>> projector.add_(features, torch.tensor([[2.0]]), start=7, key=0)
    >>> features.abs()
    tensor([[1., 1., 1., 1.]])
    """

    name = "rademacher"

    def add_(self, features: Tensor, gradients: Tensor, start: int, key: int) -> None:
        """Add the block's projection, with one GEMM for each block of rows of P; see `Projector.add_`."""
        if triton_kernel.available(features.device):
            triton_kernel.rademacher_add_(features, gradients, start, key, self.proj_dim)
            return
        drawn, rows = (max(1, entries // self.proj_dim) for entries in (_DRAWN, _BLOCK_ENTRIES))
        for first in range(0, gradients.shape[1], drawn):
            part = gradients[:, first : first + drawn].to(features.dtype)
            begin = start + first
            words = random_words(begin, begin + part.shape[1], self.proj_dim, key, _STREAM, features.device)
            for block, bits in zip(part.split(rows, dim=1), words.split(rows), strict=True):
                with full_precision():
                    features.addmm_(block, signs_of(bits, self.proj_dim), alpha=self.proj_dim**-0.5)

    def rehearsal(self) -> Projector:
        """Return the sparse projector: drawing signs is slow, and their memory does not depend on the batch size."""
        return SparseProjector(self.proj_dim)

    def signs(
        self,
        start: int,
        stop: int,
        key: int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw √k·P[start:stop], of shape (stop − start, k): entries ±1, float32."""
        return random_signs(start, stop, self.proj_dim, key, _STREAM, torch.device(device))
