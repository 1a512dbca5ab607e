"""How much to damp H: by the training time; where that is unknown, by cross-validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.influence.gauss_newton import GaussNewton
from lightning_trak.influence.training_time import TrainingTime

PART_OF_TIME = 0.25
PART_OF_TIME_WHITENED = 0.5
LEAST_DAMPING = 1e-3  # with less, H of fewer examples than features is singular in float32

CANDIDATES = (0.3, 1.0, 3.0, 10.0)
EXAMPLES = 1000  # training examples that suffice to choose λ

_LEAST_WEIGHT = 1e-6  # relative to the largest
_OPTIMUM, _FAR = 1e-3, 1e-1  # r of `distance_to_optimum`, at an optimum and far from it
_ALIKE = 0.005  # candidates whose errors differ by less, relatively, count as equal


class Damping(NamedTuple):
    """λ, and how it was chosen."""

    value: float
    rule: str


def damping_of(sums: GaussNewton, trainings: Sequence[TrainingTime]) -> Damping:
    """Choose λ at one checkpoint: by a rule, and smaller near an optimum of training.

    Args:
        sums: H at the checkpoint; also the λ of cross-validation, where `needs_cross_validation`.
        trainings: the training times of all checkpoints where it is known; empty if it is unknown at this one.
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
    """Say whether λ at a checkpoint cannot follow from the training time; see `damping_of`."""
    return not trainings or sums.curvature_scale <= 0


def training_damping(trainings: Sequence[TrainingTime], n_train: int, scale: float) -> float:
    """Return the damping with which a Newton step goes as far as training did.

    Take gradient flow on the mean loss of a linearised model, whose Gauss–Newton matrix is H / n. Along an eigenvector
    of eigenvalue s it covers the fraction 1 − exp(−t s) of the way to the optimum in time t. Ridge regression of
    strength 1 / t covers nearly the same fraction: s / (s + 1 / t). Weight decay adds to that strength (Ali, Kolter and
    Tibshirani, "A continuous-time view of early stopping for least squares regression", AISTATS 2019, arXiv
    1810.10082).

    Here t is a quarter of the longest training time, at every checkpoint. An example acts at every step, so most of its
    effect had less time than the whole training. On the tasks of ``python -m tests.benchmarks quality`` the LDS hardly
    changes around this value.

    Args:
        trainings: the training times of the checkpoints, at least one.
        n_train: n.
        scale: the mean diagonal of Φᵀ diag(w) Φ.

    >>> training_damping([TrainingTime(time=4.0), TrainingTime(time=20.0)], n_train=100, scale=80.0)
    0.25
    """
    return max(LEAST_DAMPING, n_train * _strength(trainings, PART_OF_TIME) / scale)


def whitening_damping(
    means: Mapping[str, float], given: float | str = "auto", trainings: Sequence[TrainingTime] = ()
) -> dict[str, float]:
    """Return λ of each parameter, for whitened gradients.

    Args:
        means: the mean eigenvalue of each parameter.
        given: relative to the mean eigenvalue; ``"auto"``: from the training time, where it is known, else 1.
        trainings: the training times of all checkpoints; empty where λ does not follow from them.

    >>> whitening_damping({"weight": 3.0, "bias": 1.0}, given=0.1)
    {'weight': 0.30000000000000004, 'bias': 0.1}
    """
    strength = whitening_strength(trainings) if given == "auto" else None
    if strength is not None:
        return dict.fromkeys(means, strength)
    relative = 1.0 if isinstance(given, str) else given
    return {name: relative * mean for name, mean in means.items()}


def whitening_strength(trainings: Sequence[TrainingTime]) -> float | None:
    """Return λ for whitened gradients: ridge regression of strength 1 / t goes as far as training did in the time t.

    See `training_damping`. Here t is half the longest training time: on the tasks of ``python -m tests.benchmarks
    quality`` the LDS hardly changes around this value.

    Args:
        trainings: the training times of the checkpoints; empty where it is unknown. Then the result is None.

    >>> whitening_strength([TrainingTime(time=1.0, weight_decay=0.1), TrainingTime(time=4.0, weight_decay=0.1)])
    0.6
    """
    known = any(training.time > 0 for training in trainings)
    return _strength(trainings, PART_OF_TIME_WHITENED) if known else None


def _strength(trainings: Sequence[TrainingTime], part: float) -> float:
    """Return the strength of ridge regression that goes as far as a part of the longest training, with its decay."""
    decay = sum(training.weight_decay for training in trainings) / len(trainings)
    return 1 / (part * max(training.time for training in trainings)) + decay


def distance_to_optimum(gradient: Tensor, squares: float) -> float:
    """Return 0 where the gradients of the examples cancel out, as at an optimum; 1 far from one; else in between.

    Let r = ‖Φᵀq‖² / Σ q² ‖φ‖². With random signs of q it is 1 on average. The result is 0 for r ≤ 0.001, 1 for r ≥ 0.1,
    and linear in log r in between.

    Args:
        gradient: Φᵀq, (k,), summed over the whole train set.
        squares: Σ q² ‖φ‖².

    >>> [round(distance_to_optimum(torch.tensor([size]), 1.0), 3) for size in (0.0, 0.1, 1.0)]
    [0.0, 0.5, 1.0]
    """
    square = gradient.square().sum().item()
    if square <= _OPTIMUM * squares:
        return 0.0
    return min(1.0, math.log(square / squares / _OPTIMUM) / math.log(_FAR / _OPTIMUM))


def between(one: float, other: float, part: float) -> float:
    """Return the geometric mean of two dampings; the second has the weight ``part``, from 0 to 1.

    >>> between(0.01, 1.0, 0.5)
    0.1
    """
    return float(one ** (1 - part) * other**part)


def choose_damping(features: Tensor, loss_grad: Tensor, weights: Tensor, scale: Tensor | float) -> float:
    """Return the damping, from 0.3 to 10, with which the linearised model best predicts examples that are left out.

    Scores come from the Newton step H⁻¹Φᵀq. It is the ridge regression of q / w on the features, with weights w. Let λ
    be the damping, A = W^½ Φ, y = W^½ (q / w) and S = A (AᵀA + λ·scale·I)⁻¹ Aᵀ. Then the residual of an example that is
    left out is (y − S y)ᵢ / (1 − Sᵢᵢ) (Allen, "The relationship between variable selection and data augmentation",
    Technometrics 1974). The error e of a candidate is the mean of their absolute values.

    The result is the geometric mean of the `CANDIDATES`, weighted with exp(−(e − min e) / (0.005 min e)). So it is the
    best candidate, unless others are as good within half a per cent, and it does not jump where another becomes the
    best. It hardly depends on how many examples are used, since λ·scale is the prior precision of a Bayesian
    regression.

    At an optimum of training nothing is left to predict, see `distance_to_optimum`. Duplicates in the train set make
    examples look easier to predict than they are, and the damping too small.

    On the tasks of ``python -m tests.benchmarks quality`` the best fixed damping is 0.3 on one and 10 on another. These
    were tried too, and are no better over all tasks: squared residuals, generalised cross-validation, the evidence of
    the Bayesian regression, and one choice for all checkpoints.

    Args:
        features: Φ, (r, k), of some training examples.
        loss_grad: q, (r,).
        weights: w, (r,), not negative; ones for H without curvature.
        scale: the mean diagonal of H, summed over the whole train set.

    >>> x = torch.linspace(-1, 1, 100)[:, None]
    >>> round(choose_damping(x, x[:, 0], torch.ones(100), scale=100 / 3), 4)  # no noise: the least candidate
    0.3
    """
    if not scale > 0:
        return CANDIDATES[0]  # `factor` raises the error
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
    """Return the geometric mean of the candidates, weighted by how close their errors are to the least."""
    least = min(errors)
    if least == 0:
        return CANDIDATES[errors.index(least)]
    weights = [math.exp(-(error - least) / (_ALIKE * least)) for error in errors]
    logs = [weight * math.log(candidate) for weight, candidate in zip(weights, CANDIDATES, strict=True)]
    return math.exp(sum(logs) / sum(weights))
