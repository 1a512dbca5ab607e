"""What every projection has in common: the interface by which gradients become features."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from inspect import signature
from typing import Any, Self

from torch import Tensor

from lightning_trak.gradients.gradient import Gradient, as_rows

_DENSE_BYTES = 2**30  # of one parameter's gradients, where they are needed themselves


class Projector(ABC):
    """A family of random matrices P of shape (p, k) with E[P Pᵀ] = I, one for every key.

    A projector holds no matrix. Gradients arrive as blocks of consecutive parameters, a layer at a time if the engine
    yields them so, and are added into the features: ``features += gradients @ P[start:start + q]``. The result does
    not depend on how the parameters are cut into blocks, so nothing of shape (b, p) need ever exist.

    To write one, define `add_` and, where the dimension is not chosen freely, `dimension`.

    Args:
        proj_dim: k, the sketch dimension.

    Attributes:
        name: by default that of the class.
        drawing: the version of how P is drawn. Count it up when the same arguments come to draw another P, so that
            features of both cannot be mixed.
    """

    name: str
    drawing = 1

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments: they are part of what tells one family of matrices from another."""
        projector = super().__new__(cls)
        given = signature(cls.__init__).bind_partial(projector, *args, **kwargs)
        given.apply_defaults()
        projector._arguments = dict(list(given.arguments.items())[1:])
        return projector

    _arguments: dict[str, Any]

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

    @property
    def configuration(self) -> dict[str, Any]:
        """All that P depends on beside dimension, seed and checkpoint: name, version of the drawing, arguments.

        It is the projection's identity in the store. An attribute named as an argument counts in its place.

        Raises:
            TypeError: if an argument cannot be written as JSON.
        """
        arguments = {name: getattr(self, name, value) for name, value in self._arguments.items() if name != "proj_dim"}
        for name, value in arguments.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise TypeError(
                    f"The argument {name} of {type(self).__name__} is {type(value).__name__}, which the feature store"
                    " cannot write as JSON. Pass numbers, strings or lists, or override configuration."
                ) from error
        return {"projector": self.name, "drawing": self.drawing, **arguments}

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
        arguments = {"proj_dim": self.proj_dim, **self.configuration}
        shown = [f"{name}={value!r}" for name, value in arguments.items() if name not in ("projector", "drawing")]
        return f"{type(self).__name__}({', '.join(shown)})"


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
