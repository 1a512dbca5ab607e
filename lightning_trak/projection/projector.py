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

_DENSE_BYTES = 2**30  # of one parameter's per-sample gradients that are formed at once


class Projector(ABC):
    """A family of random matrices P of shape (p, k) with E[P Pᵀ] = I, one for every key.

    A projector holds no matrix. Gradients arrive in blocks of consecutive parameters, for example a layer at a time.
    Each block is added to the features: ``features += gradients @ P[start:start + q]``. The result does not depend on
    how the parameters are cut into blocks, so nothing of shape (b, p) is ever needed.

    To write your own, define `add_`. If k cannot be chosen freely, define `dimension` too. One with a name is listed
    in the room's `__init__`.

    Args:
        proj_dim: k, the sketch dimension.

    Attributes:
        name: by default that of the class.
        drawing: the version of the code that draws P. Increase it when the same arguments draw another P than before,
            so that features of both are never mixed.
    """

    name: str
    drawing = 1

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments: they are part of the `configuration`."""
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
        """All that P depends on besides dimension, seed and checkpoint: ``name``, ``drawing``, and the arguments.

        It identifies the projection in the store. If an attribute has an argument's name, its value counts.

        Raises:
            TypeError: if an argument cannot be written as JSON.
        """
        inherited = [name for kind in type(self).__mro__[1:-1] for name in signature(kind.__init__).parameters]  # type: ignore[misc]
        given = {name: getattr(self, name) for name in inherited if hasattr(self, name)}
        given |= {name: getattr(self, name, value) for name, value in self._arguments.items()}
        arguments = {name: value for name, value in given.items() if name != "proj_dim"}
        for name, value in arguments.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise TypeError(
                    f"The argument {name} of {type(self).__name__} is {type(value).__name__}, which the feature store"
                    " cannot write as JSON. Pass numbers, strings or lists, or override configuration."
                ) from error
        return {"projector": self.name, "drawing": self.drawing, "arguments": arguments}

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
        """Add the projection of one parameter's gradients, in any form, to ``features``, in place.

        Args:
            features: (b, k), float32.
            gradient: of b examples.
            start: index of the parameter's first entry among all p.
            key: chooses P; below 2⁶⁴.
        """
        for rows, part in gradient.split(_DENSE_BYTES):
            self.add_(features[rows], as_rows(part.dense()).float(), start, key)

    def rehearsal(self) -> Projector:
        """Return a faster projector that needs as much memory, for trying out a batch size; by default this one."""
        return self

    def forget(self) -> None:  # noqa: B027 - optional
        """Free what is cached from batch to batch; by default nothing is."""

    def __repr__(self) -> str:
        arguments = {"proj_dim": self.proj_dim, **self.configuration["arguments"]}
        shown = [f"{name}={value!r}" for name, value in arguments.items()]
        return f"{type(self).__name__}({', '.join(shown)})"


class Drawn:
    """A cache of the random numbers of one key, since every batch needs them. Another key empties it."""

    def __init__(self) -> None:
        self._key: int | None = None
        self._values: dict[Hashable, Tensor] = {}

    def get(self, key: int, where: Hashable, draw: Callable[[], Tensor]) -> Tensor:
        """Return what was drawn for ``where``, or draw it now."""
        if key != self._key:
            self.forget()
            self._key = key
        if where not in self._values:
            self._values[where] = draw()
        return self._values[where]

    def forget(self) -> None:
        """Empty the cache."""
        self._values.clear()


def projection_key(seed: int, checkpoint: str) -> int:
    """Derive the key of a checkpoint's projection: a function of the seed and the checkpoint's digest alone.

    >>> projection_key(0, "a") == projection_key(0, "a"), projection_key(0, "a") == projection_key(1, "a")
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}:{checkpoint}".encode(), digest_size=8).digest(), "little")
