"""Dense arrays as sparse matrices of all their entries."""

from __future__ import annotations

import torch

from lightning_trak.features.sparse_matrix import SparseMatrix


def sparse(values):
    """All entries, as a sparse matrix."""
    return SparseMatrix(torch.arange(values.shape[1]).expand(len(values), -1), torch.as_tensor(values))


class Sparse:
    """Rows as sparse matrices."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __getitem__(self, rows):
        return sparse(torch.as_tensor(self.values)[rows])
