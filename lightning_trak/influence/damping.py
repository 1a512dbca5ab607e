"""How much to damp H: from how long training went on; where that is unknown, by cross-validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.influence.gauss_newton import GaussNewton
from lightning_trak.influence.training_time import TrainingTime

PART_OF_TIME = 0.25
LEAST_DAMPING = 1e-3  # with less, H of fewer examples than features cannot be solved with in float32

CANDIDATES = (0.3, 1.0, 3.0, 10.0)
EXAMPLES = 1000  # of the train set that are enough to choose with

_LEAST_WEIGHT = 1e-6  # of the largest
_OPTIMUM, _FAR = 1e-3, 1e-1  # how large the gradient is, see `distance_to_optimum`, at an optimum and far from it
_ALIKE = 0.005  # relative difference of errors that hardly counts


class Damping(NamedTuple):
    """λ, and how it was chosen."""

    value: float
    rule: str


def damping_of(sums: GaussNewton, trainings: Sequence[TrainingTime]) -> Damping:
    """Choose λ at one checkpoint: by a rule, and the less the nearer training has come to its optimum.

    Args:
        sums: H at the checkpoint, with the damping of cross-validation where `needs_cross_validation`.
        trainings: of all checkpoints whose training time is known; empty if that of this one is not.
    """
    n, k = sums.n_train, len(sums.matrix)
    if not needs_cross_validation(sums, trainings):
        value, rule = training_damping(trainings, n, sums.curvature_scale), "from the training time"
        least, at_optimum = (LEAST_DAMPING, "least, as at an optimum") if n > k else (value, rule)
    else:
        assert sums.cross_validated is not None
        value, rule = sums.cross_validated, "by cross-validation"
        least, at_optimum = (LEAST_DAMPING, "least") if n > k else (CANDIDATES[0], "little")
        at_optimum += ", as at an optimum"
    distance = distance_to_optimum(sums.gradient, sums.squares)
    if distance == 0:
        return Damping(least, at_optimum)
    return Damping(between(least, value, distance), rule if distance == 1 else f"{rule}, less near an optimum")


def needs_cross_validation(sums: GaussNewton, trainings: Sequence[TrainingTime]) -> bool:
    """Say whether nothing else tells λ at a checkpoint; see `damping_of`."""
    return not trainings or sums.curvature_scale <= 0


def training_damping(trainings: Sequence[TrainingTime], n_train: int, scale: float) -> float:
    """Return the damping with which a Newton step goes as far as training did.

    Gradient flow on the mean loss of a linearised model, with H / n, goes the part 1 − exp(−t s) of the way in a
    direction of eigenvalue s. A ridge of strength 1 / t goes nearly as far, s / (s + 1 / t), and weight decay adds to
    that strength (Ali, Kolter and Tibshirani, "A continuous-time view of early stopping for least squares regression",
    AISTATS 2019, arXiv 1810.10082). It is the same at every checkpoint, that of a quarter of the longest time: on the
    tasks of ``python -m tests.benchmarks quality`` the LDS is flat about it, and examples act from step to step, so
    that most had less time than the whole.

    Args:
        trainings: of the checkpoints, at least one.
        n_train: n.
        scale: the mean diagonal of Φᵀ diag(w) Φ.

    >>> training_damping([TrainingTime(time=4.0), TrainingTime(time=20.0)], n_train=100, scale=80.0)
    0.25
    """
    strength = 1 / (PART_OF_TIME * max(training.time for training in trainings))
    decay = sum(training.weight_decay for training in trainings) / len(trainings)
    return max(LEAST_DAMPING, n_train * (strength + decay) / scale)


def distance_to_optimum(gradient: Tensor, squares: float) -> float:
    """Return 0 where the gradients of the examples add up to next to nothing, 1 where they do not, and between.

    With r = ‖Φᵀq‖² / Σ q² ‖φ‖², which is 1 for signs of q at random, it is 0 for r ≤ 0.001, 1 for r ≥ 0.1, and linear
    in log r between.

    Args:
        gradient: Φᵀq, (k,), of the whole train set.
        squares: Σ q² ‖φ‖².

    >>> [round(distance_to_optimum(torch.tensor([size]), 1.0), 3) for size in (0.0, 0.1, 1.0)]
    [0.0, 0.5, 1.0]
    """
    square = gradient.square().sum().item()
    if square <= _OPTIMUM * squares:
        return 0.0
    return min(1.0, math.log(square / squares / _OPTIMUM) / math.log(_FAR / _OPTIMUM))


def between(one: float, other: float, part: float) -> float:
    """Return the geometric mean of two dampings, the second weighted with ``part``, from 0 to 1.

    >>> between(0.01, 1.0, 0.5)
    0.1
    """
    return float(one ** (1 - part) * other**part)


def choose_damping(features: Tensor, loss_grad: Tensor, weights: Tensor, scale: Tensor | float) -> float:
    """Return the damping with which the linearised model predicts best what it has not seen, from 0.3 to 10.

    The Newton step H⁻¹Φᵀq, from which the scores come, is the ridge regression of q / w on the features, weighted with
    w. With λ the damping, A = W^½ Φ, y = W^½ (q / w) and S = A (AᵀA + λ·scale·I)⁻¹ Aᵀ, the residual of an example that
    was left out is (y − S y)ᵢ / (1 − Sᵢᵢ) (Allen, "The relationship between variable selection and data augmentation",
    Technometrics 1974); what counts is its mean absolute value e. The result is the geometric mean of the `CANDIDATES`,
    weighted with exp(−(e − min e) / (0.005 min e)): the best one, unless others are as good within half a per cent. It
    does not jump where another candidate becomes the best. As λ·scale is the precision of the prior of a Bayesian
    regression, it hardly depends on how many examples it is chosen with.

    Where training has come to its optimum nothing is left to predict, see `distance_to_optimum`. Copies of examples in
    the train set make it look easier to predict than it is, and so the damping less.

    On the tasks of ``python -m tests.benchmarks quality`` the best fixed damping is 0.3 on one and 10 on another. Tried
    too, and no better over all tasks: squared residuals, generalised cross-validation, the evidence of the Bayesian
    regression, and one choice for all checkpoints.

    Args:
        features: Φ, (r, k), of some training examples.
        loss_grad: q, (r,).
        weights: w, (r,), not negative; ones for H without curvature.
        scale: the mean diagonal of H of the whole train set.

    >>> x = torch.linspace(-1, 1, 100)[:, None]
    >>> round(choose_damping(x, x[:, 0], torch.ones(100), scale=100 / 3), 4)  # no noise: as little as there is
    0.3
    """
    if not scale > 0:
        return CANDIDATES[0]  # `factor` says what is wrong
    root = weights.double().sqrt()
    scaled = root[:, None] * features.double()
    response = root * loss_grad / weights.clamp(min=_LEAST_WEIGHT * weights.max().item())
    values, vectors = torch.linalg.eigh(scaled @ scaled.T)
    values, rotated = values.clamp(min=0), vectors.T @ response
    errors = []
    for damping in CANDIDATES:
        shrinkage = values / (values + damping * scale)
        residuals = response - vectors @ (shrinkage * rotated)
        leverages = vectors.square() @ shrinkage
        errors.append((residuals / (1 - leverages)).abs().mean().item())
    return _smooth_best(errors)


def _smooth_best(errors: Sequence[float]) -> float:
    """Return the mean of the candidates, in the logarithm, weighted by how near their errors are to the least."""
    least = min(errors)
    if least == 0:
        return CANDIDATES[errors.index(least)]
    weights = [math.exp(-(error - least) / (_ALIKE * least)) for error in errors]
    logs = [weight * math.log(candidate) for weight, candidate in zip(weights, CANDIDATES, strict=True)]
    return math.exp(sum(logs) / sum(weights))
