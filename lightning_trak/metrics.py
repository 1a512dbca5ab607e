"""How well scores predict the outcome of retraining: the linear datamodeling score (LDS)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Interval(NamedTuple):
    """A confidence interval."""

    lower: Tensor
    upper: Tensor


def linear_datamodeling_score(scores: Tensor, masks: Tensor, outputs: Tensor) -> Tensor:
    """Return the LDS: the rank correlation of predicted and actual outputs after training on subsets.

    The prediction for target j after training on subset S is Σ_{i∈S} τᵢⱼ. The LDS of a target is Spearman's rank
    correlation of predictions and outputs over the subsets, with ties averaged. Its mean over targets is returned. See
    TRAK, arXiv 2303.14186, Definition 2.3; Ilyas et al., "Datamodels", arXiv 2202.00622.

    Args:
        scores: τ, (n, m).
        masks: (s, n), bool; row t says which training examples are in subset t.
        outputs: (s, m), the model outputs of the targets after training on each subset.

    Returns:
        The mean over targets, a scalar from −1 to 1. A target whose outputs or predictions do not vary counts as 0.

    Raises:
        ValueError: if shapes do not fit together, a value is not finite, or there are fewer than 2 subsets.

    >>> scores = torch.tensor([[1.0], [2.0], [4.0]])
    >>> masks = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
    >>> linear_datamodeling_score(scores, masks, outputs=torch.tensor([[0.1], [0.5], [0.9]]))
    tensor(1.)
    """
    return spearman(predicted_outputs(scores, masks), outputs).mean()


def predicted_outputs(scores: Any, masks: Tensor) -> Tensor:
    """Return Σ_{i∈S} τᵢⱼ for every subset S and target j: (n, m), (s, n) → (s, m). Scores may be on disk."""
    if scores.ndim != 2 or masks.ndim != 2 or masks.shape[1] != len(scores):
        raise ValueError(
            f"scores must be (n, m) and masks (s, n), got {tuple(scores.shape)} and {tuple(masks.shape)}. Scores of"
            " trainer.attribute are (n, m): a row for each training example."
        )
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool, got {masks.dtype}. Convert it with masks.bool().")
    return masks.to(scores.device, scores.dtype) @ scores


def spearman(preds: Tensor, target: Tensor) -> Tensor:
    """Return Spearman's rank correlation of every column, with ties averaged: (s, m), (s, m) → (m,).

    A constant column has no order, and gives 0.

    >>> spearman(torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
    tensor([0.8660])
    """
    _check_pair(preds, target)
    return (_standardised_ranks(preds) * _standardised_ranks(target)).sum(0).clamp(-1, 1).float()


class LinearDatamodelingScore(Metric):
    """The linear datamodeling score as a metric of torchmetrics, updated with subsets; see `linear_datamodeling_score`.

    Args:
        n_bootstrap: the number of resamples for `interval`.
        confidence: the confidence level of `interval`.
        seed: the seed of the resamples.
        kwargs: passed to ``torchmetrics.Metric``.

    >>> metric = LinearDatamodelingScore()
    >>> metric.update(preds=torch.tensor([[3.0], [5.0]]), target=torch.tensor([[0.1], [0.5]]))
    >>> metric.update(preds=torch.tensor([[6.0]]), target=torch.tensor([[0.9]]))
    >>> metric.compute()
    tensor(1.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    preds: list[Tensor]
    target: list[Tensor]

    def __init__(self, n_bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_bootstrap < 1 or not 0 < confidence < 1:
            raise ValueError(
                "n_bootstrap must be a positive integer and confidence between 0 and 1, got"
                f" {n_bootstrap!r} and {confidence!r}."
            )
        self.n_bootstrap, self.confidence, self.seed = n_bootstrap, confidence, seed
        self.add_state("preds", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add subsets.

        Args:
            preds: (s, m), the predictions of scores for s subsets and m targets: ``masks.float() @ scores``.
            target: (s, m), the model outputs after training on each subset.
        """
        _check_shapes(preds, target)
        self.preds.append(preds.detach())
        self.target.append(target.detach())

    def compute(self) -> Tensor:
        """Return the mean over targets, a scalar."""
        return spearman(*self._all()).mean()

    def per_target(self) -> Tensor:
        """Return the LDS of every target, (m,)."""
        with self._synchronised():
            return spearman(*self._all())

    def interval(self) -> Interval:
        """Return a bootstrap confidence interval of the mean. Both subsets and targets are resampled.

        Ranks are computed once, from all subsets; a subset is weighted by how often it is drawn. Owen, "The pigeonhole
        bootstrap", Annals of Applied Statistics 2007.
        """
        with self._synchronised():
            preds, target = self._all()
        _check_pair(preds, target)
        means = _bootstrap(_ranks(preds), _ranks(target), self.n_bootstrap, self.seed)
        tail = (1 - self.confidence) / 2
        return Interval(*means.quantile(torch.tensor([tail, 1 - tail], device=means.device)))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or given values; see ``torchmetrics.Metric.plot``. Return figure and axes."""
        return self._plot(val, ax)

    def _all(self) -> tuple[Tensor, Tensor]:
        if len(self.preds) == 0:
            raise ValueError("LinearDatamodelingScore has no subsets yet; call update(preds, target).")
        return dim_zero_cat(self.preds), dim_zero_cat(self.target)

    def _synchronised(self) -> Any:
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync)


def _check_shapes(preds: Tensor, target: Tensor) -> None:
    if preds.ndim != 2 or preds.shape != target.shape:
        raise ValueError(
            f"Predictions and outputs must both be (subsets, targets), got {tuple(preds.shape)} and"
            f" {tuple(target.shape)}."
        )


def _check_pair(preds: Tensor, target: Tensor) -> None:
    _check_shapes(preds, target)
    if len(preds) < 2:
        raise ValueError(f"A correlation over subsets needs at least 2 of them, got {len(preds)}.")
    for what, values in (("scores", preds), ("outputs", target)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"The {what} have NaN or infinite values in {int((~values.isfinite()).sum())} places.")


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks in every column, from 1; ties have their mean rank; float64."""
    columns = values.T.contiguous()
    ordered = columns.sort(dim=1).values
    below, up_to = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    return ((below + up_to + 1).double() / 2).T


def _standardised_ranks(values: Tensor) -> Tensor:
    ranks = _ranks(values)
    return normalize(ranks - ranks.mean(0), dim=0)


def _bootstrap(preds: Tensor, target: Tensor, times: int, seed: int) -> Tensor:
    """Return the mean rank correlations of resampled subsets and targets, (times,)."""
    s, m = preds.shape
    generator = torch.Generator().manual_seed(seed)
    subsets, targets = (torch.zeros(times, size, dtype=torch.float64) for size in (s, m))
    for counts in (subsets, targets):
        size = counts.shape[1]
        drawn = torch.randint(size, (times, size), generator=generator)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64)).div_(size)
    subsets, targets = subsets.to(preds), targets.to(preds)
    x, y = preds - preds.mean(0), target - target.mean(0)  # centred: else differences of squares lose digits
    mean_x, mean_y = subsets @ x, subsets @ y
    covariance = subsets @ (x * y) - mean_x * mean_y
    variances = (subsets @ x**2 - mean_x**2) * (subsets @ y**2 - mean_y**2)
    correlations = covariance / variances.clamp(min=1e-12).sqrt()
    return (correlations * targets).sum(1).float()
