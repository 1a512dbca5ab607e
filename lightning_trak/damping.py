"""How much to damp the kernel: chosen by leave-one-out cross-validation on the linearised model."""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = (0.3, 1.0, 3.0, 10.0)
EXAMPLES = 1000  # of the train set that are enough to choose with

_LEAST = 1e-6  # of the largest weight
_LEFT = 0.1  # of what noise would leave to explain


def choose_damping(features: Tensor, loss_grad: Tensor, weights: Tensor, scale: Tensor | float) -> float:
    """Return that of the `CANDIDATES` with which the linearised model predicts best what it has not seen.

    The Newton step H⁻¹Φᵀq, from which the scores come, is the ridge regression of q / w on the features, weighted with
    w. With λ the damping, A = W^½ Φ, y = W^½ (q / w) and S = A (AᵀA + λ·scale·I)⁻¹ Aᵀ, the residual of an example that
    was left out is (y − S y)ᵢ / (1 − Sᵢᵢ) (Allen, "The relationship between variable selection and data augmentation",
    Technometrics 1974); least is its mean absolute value. As λ·scale is the precision of the prior of a Bayesian
    regression, it hardly depends on how many examples it is chosen with.

    Where training has come to its optimum, Φᵀq = 0, nothing is left to predict, and the least damping is taken. Copies
    of examples in the train set make it look easier to predict than it is, and so the damping less.

    On the tasks of ``python -m tests.benchmarks quality`` the best fixed damping is 0.3 on one and 10 on another. Tried
    too, and no better over all tasks: squared residuals, generalised cross-validation, the evidence of the Bayesian
    regression, and one choice for all checkpoints.

    Args:
        features: Φ, (r, k), of some training examples.
        loss_grad: q, (r,).
        weights: w, (r,), not negative; ones for a kernel without curvature.
        scale: the mean diagonal of the kernel of the whole train set.

    >>> x = torch.linspace(-1, 1, 100)[:, None]
    >>> choose_damping(x, x[:, 0], torch.ones(100), scale=100 / 3)  # no noise: as little as there is
    0.3
    """
    if not scale > 0:
        return CANDIDATES[0]  # `factor` says what is wrong
    root = weights.double().sqrt()
    scaled = root[:, None] * features.double()
    response = root * loss_grad / weights.clamp(min=_LEAST * weights.max().item())
    values, vectors = torch.linalg.eigh(scaled @ scaled.T)
    values, rotated = values.clamp(min=0), vectors.T @ response
    least = values / (values + CANDIDATES[0] * scale)
    explained = 1 - (response - vectors @ (least * rotated)).square().sum() / response.square().sum()
    if not explained > _LEFT * least.mean():  # of noise, as much is explained as there are parameters to an example
        return CANDIDATES[0]
    errors = []
    for damping in CANDIDATES:
        shrinkage = values / (values + damping * scale)
        residuals = response - vectors @ (shrinkage * rotated)
        leverages = vectors.square() @ shrinkage
        errors.append((residuals / (1 - leverages)).abs().mean().item())
    return CANDIDATES[errors.index(min(errors))]
