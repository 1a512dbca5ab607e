"""The projection that projects nothing."""

from __future__ import annotations

from torch import Tensor

from lightning_trak.projection.projector import Projector


class IdentityProjector(Projector):
    """P = I: the features are the gradients themselves, so k = p whatever ``proj_dim`` says.

    It is exact, and the cheapest choice for a model that has no more parameters than features.

    >>> import torch
    >>> features = torch.zeros(1, 3)
    >>> IdentityProjector().add_(features, torch.tensor([[5.0, 7.0]]), start=1, key=0)
    >>> features
    tensor([[0., 5., 7.]])
    """

    name = "identity"

    def dimension(self, n_params: int) -> int:
        """Return ``n_params``."""
        return n_params

    def add_(self, features: Tensor, gradients: Tensor, start: int, key: int) -> None:
        """Add the block in its own place; see `Projector.add_`."""
        features[:, start : start + gradients.shape[1]] += gradients
