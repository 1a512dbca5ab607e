"""Weights of several kinds of scores, fitted to the outputs of models that were retrained on subsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_trak.influence.estimator import Estimator, Solved
from lightning_trak.influence.gauss_newton import GaussNewton
from lightning_trak.influence.scores import score_products
from lightning_trak.influence.train_features import TrainFeatures

_LEAST_SUBSETS = 4
_MULTIPLES = (1.0, 0.25, 4.0)  # of λ; the first is the usual one
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e6)  # relative; with the last only the scale is fitted
_FOLDS = 5


@dataclass(frozen=True)
class Kinds:
    """The kinds of scores at one checkpoint, whose weights are fitted.

    For projected features these are the scores with λ, λ / 4 and 4 λ. For features that are whitened by the whole
    curvature, they are the parts that each layer contributes. Features that are whitened by what the outputs leave open
    have one kind.

    Attributes:
        estimator: gives the scores.
        train: one of its ``trains``.
        targets: φ(z), (m, k), as for `Estimator.solve`.
        sums: what `Estimator.accumulate` returned; None for whitened features.
        layers: the columns of each layer, in order and without gaps; of use for whitened features alone.
    """

    estimator: Estimator
    train: TrainFeatures
    targets: Any
    sums: GaussNewton | None
    layers: Sequence[slice]

    @property
    def usual(self) -> list[float]:
        """The weights without calibration."""
        if self.sums is not None:
            return [float(multiple == 1) for multiple in _MULTIPLES]
        return [1.0] * (1 if self.train.whitened_by_rest else len(self.layers))

    def each(self) -> Iterator[Solved]:
        """Yield what `Estimator.solve` returns for each kind."""
        if self.sums is not None:
            for multiple in _MULTIPLES:
                sums = replace(self.sums, matrix=self.sums.matrix.clone())
                yield self.estimator.solve(self.train, self.targets, sums, multiple)
        elif self.train.whitened_by_rest:
            yield self.estimator.solve(self.train, self.targets)
        else:
            for one in torch.eye(len(self.layers)):
                yield self.estimator.solve(self.train, self._weighted(one))

    def predictions(self, masks: Tensor) -> Tensor:
        """Return what each kind predicts for subsets, (c, s, m): its scores, summed over the subset, divided by α.

        A subset with a part α of the train set has α times the curvature.

        Args:
            masks: (s, n), bool; row t says which training examples are in subset t.
        """
        return torch.stack([self._predictions(one, masks.float()) for one in self.each()])

    def _predictions(self, solved: Solved, masks: Tensor) -> Tensor:
        total = torch.zeros(len(masks), len(solved.vectors))
        for rows, features, loss_grad, _ in self.train.blocks(len(solved.vectors)):
            q = loss_grad if solved.factor is None else loss_grad * solved.factor[rows]
            total += masks[:, rows] @ score_products(features, q, solved.vectors, self.estimator.device).cpu()
        return total / masks.mean(1, keepdim=True)

    def combined(self, weights: Tensor) -> Solved:
        """Return the weighted sum of all kinds."""
        if self.sums is None and not self.train.whitened_by_rest:
            return self.estimator.solve(self.train, self._weighted(weights))
        total: Any = None
        for one, weight in zip(self.each(), weights.tolist(), strict=True):
            vectors = one.vectors * weight
            total = one._replace(vectors=vectors if total is None else total.vectors + vectors)
        return total  # type: ignore[no-any-return]

    def _weighted(self, weights: Tensor) -> Any:
        """Return the targets' features, each layer's multiplied with its weight."""
        return self.targets.scaled_in_ranges(torch.tensor([layer.start for layer in self.layers]), weights)


def fit_weights(predicted: Tensor, actual: Tensor, usual: Tensor) -> Tensor:
    """Fit the weights with which several kinds of scores together predict the outputs after retraining.

    Kind c of scores, of one checkpoint, damping or layer, predicts P_c for all subsets and targets. P_c and Y are
    centred for each target. The usual weights are u, and a is the scale with which a Σ_c u_c P_c predicts Y best. The
    weights v are those of ridge regression towards a u::

        min_v  ‖Y − Σ_c v_c P_c‖² + ρ Σ_c (v_c − a u_c)²

    The strength ρ is chosen by cross-validation over subsets: the largest whose error is within one standard error of
    the least (Hastie, Tibshirani and Friedman, "The elements of statistical learning", Section 7.10). With the largest
    of all, only the scale is fitted. Weights of layers are learned in arXiv 2506.05647 too.

    Args:
        predicted: P, (c, s, m).
        actual: Y, the outputs of the targets, (s, m).
        usual: u, (c,): the weights without calibration.

    Raises:
        ValueError: if there are too few subsets, or the usual scores do not predict the outputs at all.

    >>> predicted = torch.randn(2, 10, 50)
    >>> fit_weights(predicted, 3 * predicted[0], torch.tensor([0.5, 0.5])).round()
    tensor([3., 0.])
    """
    subsets, actual = len(actual), actual.float()
    if subsets < _LEAST_SUBSETS:
        raise ValueError(f"Calibration needs outputs of at least {_LEAST_SUBSETS} retrained subsets, got {subsets}.")
    fold = torch.arange(subsets) % min(_FOLDS, subsets)
    errors = torch.zeros(len(_RIDGES), subsets)
    for left_out in fold.unique():
        seen, unseen = fold != left_out, fold == left_out
        means, mean = predicted[:, seen].mean(1, keepdim=True), actual[seen].mean(0)
        for number, weights in enumerate(_ridge_regressions(predicted[:, seen], actual[seen], usual)):
            found = torch.einsum("c,csm->sm", weights, predicted[:, unseen] - means)
            errors[number, unseen] = (actual[unseen] - mean - found).square().sum(1)
    fitted = _ridge_regressions(predicted, actual, usual)
    if not (fitted[-1] @ usual) > 0:  # zero where predictions are the same for all subsets
        raise ValueError(
            "The scores do not predict the outputs of the retrained models: predicted and actual outputs do not rise"
            " together. Check that both are of the same train set, in the same order, and of the same targets."
        )
    above = errors - errors[errors.sum(1).argmin()]
    alike = above.mean(1) <= above.std(1) / subsets**0.5
    return fitted[int(alike.nonzero()[-1])]


def _ridge_regressions(predicted: Tensor, actual: Tensor, usual: Tensor) -> list[Tensor]:
    """Return the weights, (c,), for each strength."""
    p = (predicted - predicted.mean(1, keepdim=True)).flatten(1).double()
    gram, target = p @ p.T, p @ (actual - actual.mean(0)).flatten().double()
    u = usual.double()
    size, along, tiny = u @ gram @ u, u @ target, torch.finfo(torch.float64).tiny
    prior, scale = along / size.clamp(min=tiny) * u, gram.diagonal().mean().clamp(min=tiny)
    identity = torch.eye(len(gram), dtype=torch.float64)
    return [
        torch.linalg.solve(gram + ridge * scale * identity, target + ridge * scale * prior).float() for ridge in _RIDGES
    ]
