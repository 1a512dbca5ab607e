"""Random projections of per-sample gradients: pure torch, drawn from a counter-based generator, never stored.

All projections are unbiased: E⟨φ(x), φ(y)⟩ = ⟨∇f(x), ∇f(y)⟩. ``"factored"`` projects a layer's inputs and output
gradients before they are multiplied, so no per-sample gradient is formed. ``"sparse"`` and ``"rademacher"`` form the
exact gradients, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_trak.projection.factored import FactoredProjector
from lightning_trak.projection.fast_jl import FastJLProjector, fast_jl_or_rademacher
from lightning_trak.projection.identity import IdentityProjector
from lightning_trak.projection.projector import Projector, projection_key
from lightning_trak.projection.rademacher import RademacherProjector
from lightning_trak.projection.sparse import SparseProjector

__all__ = [
    "FactoredProjector",
    "FastJLProjector",
    "IdentityProjector",
    "Projector",
    "RademacherProjector",
    "SparseProjector",
]
__all__ += ["make_projector", "projection_key", "restore_projector"]

_CLASSES: dict[str, type[Projector]] = {
    own.name: own
    for own in (FactoredProjector, FastJLProjector, IdentityProjector, RademacherProjector, SparseProjector)
}
_BY_NAME: dict[str, Callable[[int], Projector]] = {**_CLASSES, "fast_jl": fast_jl_or_rademacher}


def check_projector(projector: str | Projector, proj_dim: int) -> None:
    """Raise a ValueError or TypeError unless ``projector`` is a known name or a `Projector`, and takes ``proj_dim``."""
    if projector == "fast_jl":
        FastJLProjector.check_proj_dim(proj_dim)
    if isinstance(projector, Projector) or projector == "auto" or projector in _BY_NAME:
        return
    expected = f"'auto', {', '.join(map(repr, _BY_NAME))} or a Projector"
    error = ValueError if isinstance(projector, str) else TypeError
    raise error(f"projector must be {expected}, got {projector!r}.")


def make_projector(projector: str | Projector, proj_dim: int, n_params: int) -> Projector:
    """Build the projector that a name stands for; a `Projector` is returned as it is.

    ``"auto"`` is ``"identity"`` where the gradients have no more than ``proj_dim`` entries, else ``"factored"``.

    >>> make_projector("auto", proj_dim=2048, n_params=10**6)
    FactoredProjector(proj_dim=2048, rank=64)
    """
    check_projector(projector, proj_dim)
    if isinstance(projector, Projector):
        return projector
    if projector == "auto":
        projector = "identity" if n_params <= proj_dim else "factored"
    return _BY_NAME[projector](proj_dim)


def restore_projector(configuration: Mapping[str, Any], proj_dim: int) -> Projector:
    """Build the projector from the `Projector.configuration` in a store.

    Args:
        configuration: that of a projector that ``TRAKCallback(projector=...)`` knows by name.
        proj_dim: k.

    Raises:
        ValueError: if it is that of a user's own projector, which only the user can build.

    >>> restore_projector(FactoredProjector(rank=8).configuration, proj_dim=16).rank
    8
    """
    name, arguments = configuration["projector"], configuration["arguments"]
    if name not in _CLASSES:
        raise ValueError(
            f"The store was made with the projector {name!r} and its arguments {arguments}. Pass the same one with"
            " TRAKCallback(projector=...)."
        )
    return _CLASSES[name](proj_dim=proj_dim, **arguments)
