"""What every projection has in common: the interface by which gradients become features."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable

from torch import Tensor

from lightning_trak.gradients.gradient import Gradient, as_rows

_DENSE_BYTES = 2**30  # of one parameter's gradients, where they are needed themselves


class Projector(ABC):
    """A family of random matrices P of shape (p, k) with E[P Pᵀ] = I, one for every key.

    A projector holds no matrix. Gradients arrive as blocks of consecutive parameters, a layer at a time if the engine
    yields them so, and are added into the features: ``features += gradients @ P[start:start + q]``. The result does
    not depend on how the parameters are cut into blocks, so nothing of shape (b, p) need ever exist.

    To write one, define `add_` and, where the dimension is not chosen freely, `dimension`. Its ``name``, by default
    that of the class, stands in the store for all that P depends on beside dimension and key.

    Args:
        proj_dim: k, the sketch dimension.
    """

    name: str

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __init__(self, proj_dim: int = 2048) -> None:
        self.check_proj_dim(proj_dim)
        self.proj_dim = proj_dim

    @staticmethod
    def check_proj_dim(proj_dim: int) -> None:
        """Raise a ValueError unless ``proj_dim`` is a positive integer."""
        if isinstance(proj_dim, bool) or not isinstance(proj_dim, int) or proj_dim < 1:
            raise ValueError(f"proj_dim must be a positive integer, got {proj_dim!r}.")

    def dimension(self, n_params: int) -> int:
        """Return k for gradients of ``n_params`` entries."""
        return self.proj_dim

    @abstractmethod
    def add_(self, features: Tensor, gradients: Tensor, start: int, key: int) -> None:
        """Add the projection of a block of gradients to ``features``, in place.

        Args:
            features: (b, k), float32.
            gradients: (b, q), the entries ``start`` to ``start + q`` of the flattened per-sample gradients.
            start: index of the block's first parameter among all p.
            key: chooses P; below 2⁶⁴.
        """

    def add_gradient_(self, features: Tensor, gradient: Gradient, start: int, key: int) -> None:
        """Add the projection of one parameter's gradients, in whatever form they are, to ``features``, in place.

        Args:
            features: (b, k), float32.
            gradient: of b examples.
            start: index of the parameter's first entry among all p.
            key: chooses P; below 2⁶⁴.
        """
        for rows, part in gradient.split(_DENSE_BYTES):
            self.add_(features[rows], as_rows(part.dense()).float(), start, key)

    def rehearsal(self) -> Projector:
        """Return a projector that takes as much memory, and as little time as may be, to try a batch size with."""
        return self

    def forget(self) -> None:  # noqa: B027 - optional
        """Let go of what is kept from batch to batch of one key; there need not be anything."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(proj_dim={self.proj_dim})"


class Drawn:
    """Random numbers of one key, kept since batch after batch needs them, until another key is asked for."""

    def __init__(self) -> None:
        self._key: int | None = None
        self._values: dict[Hashable, Tensor] = {}

    def get(self, key: int, where: Hashable, draw: Callable[[], Tensor]) -> Tensor:
        """Return what was drawn ``where``, or draw it."""
        if key != self._key:
            self.forget()
            self._key = key
        if where not in self._values:
            self._values[where] = draw()
        return self._values[where]

    def forget(self) -> None:
        """Let go of everything."""
        self._values.clear()


def projection_key(seed: int, checkpoint: str) -> int:
    """Derive the key of a checkpoint's projection: a function of the seed and the checkpoint's digest alone.

    >>> projection_key(0, "a") == projection_key(0, "a"), projection_key(0, "a") == projection_key(1, "a")
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}:{checkpoint}".encode(), digest_size=8).digest(), "little")
