"""Random projections of per-sample gradients: pure torch, drawn from a counter-based generator, never stored."""

from __future__ import annotations

from collections.abc import Callable

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
__all__ += ["make_projector", "projection_key"]

_BY_NAME: dict[str, Callable[[int], Projector]] = {
    "factored": FactoredProjector,
    "fast_jl": fast_jl_or_rademacher,
    "identity": IdentityProjector,
    "rademacher": RademacherProjector,
    "sparse": SparseProjector,
}


def check_projector(projector: str | Projector, proj_dim: int) -> None:
    """Raise a ValueError or TypeError if ``projector`` is neither a known name nor a `Projector`, or k not for it."""
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
    FactoredProjector(proj_dim=2048)
    """
    check_projector(projector, proj_dim)
    if isinstance(projector, Projector):
        return projector
    if projector == "auto":
        projector = "identity" if n_params <= proj_dim else "factored"
    return _BY_NAME[projector](proj_dim)
