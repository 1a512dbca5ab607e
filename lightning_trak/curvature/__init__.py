"""The curvature of the training loss: Kronecker factors of each parameter, and gradients whitened by them.

Per-sample gradients of a loss with drawn labels come in, eigenbases and eigenvalues go out. May import `gradients` and
`projection`; no Lightning.
"""

from lightning_trak.curvature.kronecker import Curvature, EigenBasis, Eigenvalues, SecondMoments
from lightning_trak.curvature.preconditioner import Preconditioner
from lightning_trak.curvature.whitening import Whitening, rescaling

__all__ = ["Curvature", "EigenBasis", "Eigenvalues", "Preconditioner", "SecondMoments", "Whitening", "rescaling"]
