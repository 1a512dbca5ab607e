"""How scores were computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttributionInfo:
    """How scores were computed.

    Attributes:
        n_train: n.
        n_targets: m.
        checkpoints: the digests of the checkpoints that scores are averaged over.
        projector: the name of the projection.
        proj_dim: k.
        damping: λ, or ``"auto"``, as given.
        curvature: whether H was weighted with the loss's curvature.
        dampings: λ at every checkpoint.
        damping_rules: how λ was chosen at every checkpoint.
        temperature: the number that divided model outputs in Q and w.
        estimator: ``"gauss_newton"`` or ``"trak"``.
        loss_explained: where the loss is no function of the output, the part of its gradients (of their squared norms)
            that lies along the gradients of the output. There is a number for every checkpoint that was featurized
            without interruption.
        preconditioner: ``"kronecker"`` if gradients were whitened by the curvature of each parameter; else None.
        calibrated_on: the number of retrained subsets on which `calibrate` fitted the scores; 0 without.
        runs: the number of runs that the checkpoints are from; 0 if that is unknown, as of checkpoint files.
        n_attributed: p, the number of attributed parameters; 0 if unknown, as are the next in attributions of earlier
            versions.
        n_params: the number of all parameters of the model.
        gradients: what computed per-sample gradients; empty if unknown, or if all features were stored.
        warnings: what this process warned of, in training or attribution.
    """

    n_train: int
    n_targets: int
    checkpoints: tuple[str, ...]
    projector: str
    proj_dim: int
    damping: float | str
    curvature: bool
    dampings: tuple[float, ...] = ()
    damping_rules: tuple[str, ...] = ()
    temperature: float = 1.0
    estimator: str = "gauss_newton"
    loss_explained: tuple[float, ...] = ()
    preconditioner: str | None = None
    calibrated_on: int = 0
    runs: int = 0
    n_attributed: int = 0
    n_params: int = 0
    gradients: str = ""
    warnings: tuple[str, ...] = ()

    @classmethod
    def loaded(cls, fields: Mapping[str, Any]) -> AttributionInfo:
        """Return the info whose fields were saved as JSON, where tuples became lists."""
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**known)
