"""From features of the train set and of targets to scores, over all checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.influence.damping import (
    EXAMPLES,
    Damping,
    choose_damping,
    damping_of,
    needs_cross_validation,
    whitening_strength,
)
from lightning_trak.influence.gauss_newton import (
    GaussNewton,
    accumulate,
    effective_rank,
    factor,
    solve,
    whitened,
)
from lightning_trak.influence.left_out import LeftOut, step_without, sums_without
from lightning_trak.influence.output_curvature import OutputCurvature
from lightning_trak.influence.scores import (
    Extremes,
    Scores,
    extreme_scores,
    scores,
    self_influence,
    with_mean_loss_grad,
)
from lightning_trak.influence.temperature import choose_temperature, tempered
from lightning_trak.influence.train_features import CPU, TrainFeatures


class Solved(NamedTuple):
    """The solutions of H x = φ(z) for all targets z, at one checkpoint.

    Attributes:
        vectors: H⁻¹ φ(z), (m, k); a sparse matrix if φ is, or `Corrected`.
        damping: λ.
        factor: with which to multiply the scores of every training example, (n,); None for 1.
    """

    vectors: Any
    damping: Damping
    factor: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """The arguments of `TRAKCallback` of the same names.

    Attributes:
        damping: λ, or ``"auto"``.
        temperature: T, or ``"auto"``.
        curvature: whether H is weighted with w.
        estimator: ``"gauss_newton"`` or ``"trak"``.
    """

    damping: float | str = "auto"
    temperature: float | str = "auto"
    curvature: bool = True
    estimator: str = "gauss_newton"


class Estimator:
    """Scores from features, wherever they come from: no model, no Trainer, no store.

    At one checkpoint τ = φ(z)ᵀ H⁻¹ φ(zᵢ) qᵢ. Here H = Φᵀ diag(w) Φ + λ·mean(diag)·I is the damped Gauss–Newton matrix
    of the training loss in feature space. τ is the change of f(z) by one Newton step on zᵢ. Scores are averaged over
    checkpoints, each with its own q.

    Features that are whitened by the curvature of the mean loss, over all parameters, need no other matrix: H = n I.
    For features that are whitened by what the outputs leave open, see `OutputCurvature`.

    With ``estimator="trak"`` they are those of Park et al., "TRAK", arXiv 2303.14186,
    Eq. 15 and 17.

    Args:
        trains: the train set at each checkpoint.
        options: see `Options`.
        device: where matrices are multiplied.

    Attributes:
        options: as given.
        device: as given.
        temperature: T, given or chosen.
        trains: the train set, with Q and w at that temperature.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> features, targets = rng.normal(size=(50, 4)).astype("f4"), torch.randn(3, 4)
    >>> train = TrainFeatures(features, loss_grad=np.ones(50, "f4"), curvature=np.full(50, 0.25, "f4"))
    >>> Estimator([train], Options(damping=0.1))([targets]).mean.shape
    torch.Size([50, 3])
    """

    def __init__(
        self, trains: Sequence[TrainFeatures], options: Options = Options(), device: torch.device = CPU
    ) -> None:
        self.options, self.device = options, device
        by_all = any(train.squares is not None and not train.whitened_by_rest for train in trains)
        auto_damping = options.damping == "auto" and not by_all
        self.temperature = choose_temperature(options.temperature, trains, auto_damping=auto_damping)
        if self.temperature != 1:
            trains = [tempered(train, self.temperature) for train in trains]
        self.trains = with_mean_loss_grad(trains) if options.estimator == "trak" else list(trains)
        times = [train.training_time for train in trains]
        known = [time for time in times if time is not None and time.time > 0]
        # One rule for all checkpoints: the two differ by orders of magnitude, and scores are averaged.
        self._trainings = [] if None in times else known

    def accumulate(self, train: TrainFeatures) -> GaussNewton:
        """Accumulate H at one checkpoint, and what damping depends on; the train features are read once."""
        curvature, size = self.options.curvature, EXAMPLES if self.options.damping == "auto" else 0
        sums, sample = accumulate(train, curvature=curvature, sample_size=size, device=self.device)
        if not self.suffices(train, sums):
            features, loss_grad, w = sample
            weights = w if curvature else torch.ones_like(w)
            sums.cross_validated = choose_damping(features, loss_grad, weights, sums.scale)
        return sums

    def suffices(self, train: TrainFeatures, sums: GaussNewton) -> bool:
        """Say whether stored sums contain all that the options need."""
        by_rule = self.options.damping != "auto" or not needs_cross_validation(sums, self._trainings)
        return by_rule or sums.cross_validated is not None

    def __call__(self, targets: Sequence[Any]) -> Scores:
        """Return the scores of targets, from their features φ(z), (m, k), at each checkpoint."""
        return self.scores([self.solve(train, phi) for train, phi in zip(self.trains, targets, strict=True)])

    def solve(
        self, train: TrainFeatures, targets: Any, sums: GaussNewton | None = None, multiple: float = 1.0
    ) -> Solved:
        """Solve H x = φ(z) for all targets at one checkpoint.

        Args:
            train: one of ``trains``.
            targets: φ(z), (m, k); of whitened features, a sparse matrix if those of the train set are.
            sums: what `accumulate` returned for ``train``, if it was called; H in it is overwritten.
            multiple: with which to multiply λ; not for whitened features.

        Raises:
            ValueError: if H is singular.
        """
        if train.whitened_by_rest:
            curvature = OutputCurvature(train, self.device)
            solved = (curvature.solve(targets) * (1 / train.shape[0])).to(CPU)
            return Solved(solved, self._given(train), curvature.factor())
        if train.squares is not None:
            return Solved(targets * (1 / train.shape[0]), self._given(train))
        lower, damping = self._factor(train, sums, multiple)
        vectors = solve(lower, targets.to(self.device))
        return Solved(vectors.cpu(), damping)  # those of all checkpoints would fill the device

    def self_influence(self, train: TrainFeatures, sums: GaussNewton | None = None) -> Tensor:
        """Return by how much training on each example lowers its own loss, (n,), at one checkpoint; see `solve`."""
        if train.whitened_by_rest:
            own = OutputCurvature(train, self.device).own_part()
            return torch.from_numpy(train.loss_grad).square() * own / train.shape[0]
        if train.squares is not None:
            squares, loss_grad = torch.from_numpy(train.squares), torch.from_numpy(train.loss_grad)
            return loss_grad.square() * squares / train.shape[0]
        return self_influence(train, self._factor(train, sums)[0], self.device)

    def damping(self, train: TrainFeatures, sums: GaussNewton | None = None) -> Damping:
        """Return λ at one checkpoint, with which `solve` solves."""
        if train.squares is not None:
            return self._given(train)
        return self._damping(train, self.accumulate(train) if sums is None else sums)

    def whitening(self, train: TrainFeatures, sums: GaussNewton | None = None) -> Callable[[Any], Any]:
        """Return a function from features φ, (r, k), to such whose inner products are φᵀ H⁻¹ φ, at one checkpoint.

        With H = L Lᵀ it is L⁻¹ φ. Features that are whitened already stay as they are.
        """
        if train.squares is not None:
            return lambda features: features
        lower = self._factor(train, sums)[0]
        return lambda features: whitened(lower, features.to(self.device))

    def scores(
        self,
        solved: Sequence[Solved],
        advance: Callable[[], object] = lambda: None,
        *,
        spread: bool = True,
        rows: range | None = None,
    ) -> Scores:
        """Return τ, (n, m), averaged over checkpoints. The train features are read once.

        Args:
            solved: what `solve` returned at each checkpoint.
            advance: called after every block of rows, for progress.
            spread: whether to return how scores vary from checkpoint to checkpoint.
            rows: of a range of training examples; None for all.
        """
        trains, vectors = _corrected(self.trains, solved), [one.vectors for one in solved]
        return scores(trains, vectors, advance, self.device, spread=spread, rows=rows)

    def extremes(
        self,
        solved: Sequence[Solved],
        k: int,
        advance: Callable[[], object] = lambda: None,
        *,
        rows: range | None = None,
    ) -> Extremes:
        """Return the k highest and lowest scores of each target; arguments as of `scores`, no (n, m) matrix is made."""
        trains, vectors = _corrected(self.trains, solved), [one.vectors for one in solved]
        k = min(k, trains[0].shape[0] if rows is None else len(rows))
        return extreme_scores(trains, vectors, k, advance, self.device, rows)

    def without(self, train: TrainFeatures, targets: Any, masks: Tensor, sums: GaussNewton | None = None) -> Tensor:
        """Return the change of f(z) when sets of training examples are left out, (s, m), at one checkpoint.

        For a set S it is −φ(z)ᵀ H_S⁻¹ Σ_{i∈S} qᵢ φ(zᵢ), one Newton step on the loss of the rest. Here
        H_S = H − Σ_{i∈S} wᵢ φ(zᵢ) φ(zᵢ)ᵀ, with the same damping. It differs from the sum of −τ where the members are
        alike: each of several duplicates alone has little influence, since the others stand in for it. Koh, Ang, Teo
        and Liang, "On the accuracy of influence functions for measuring group effects", NeurIPS 2019, arXiv
        1905.13289, Section 3.

        Features that are whitened by the whole curvature do not hold the curvature of S, so there it is the sum, times
        n / (n − |S|).

        Args:
            train: one of ``trains``.
            targets: φ(z), (m, k), as for `solve`.
            masks: (s, n), bool; row t says which training examples are in set t.
            sums: what `accumulate` returned for ``train``, if it was called; H in it is overwritten.
        """
        left_out = LeftOut.of(train, masks)
        if train.whitened_by_rest:
            return OutputCurvature(train, self.device).without(targets, left_out)
        if train.squares is not None:
            return sums_without(train.shape[0], targets, left_out)
        sums = self.accumulate(train) if sums is None else sums
        damping = self._damping(train, sums).value
        _check_rank(sums, damping)
        return step_without(sums, damping, targets, left_out, curvature=self.options.curvature)

    def _given(self, train: TrainFeatures) -> Damping:
        """Return the damping with which gradients were whitened."""
        given = self.options.damping
        strength = whitening_strength(self._trainings) if train.whitened_by_rest and given == "auto" else None
        if strength is not None:
            return Damping(strength, "from the training time")
        return Damping(1.0 if isinstance(given, str) else given, "relative to each parameter's mean eigenvalue")

    def _factor(self, train: TrainFeatures, sums: GaussNewton | None, multiple: float = 1.0) -> tuple[Tensor, Damping]:
        """Damp and factor H at one checkpoint."""
        sums = self.accumulate(train) if sums is None else sums
        value, rule = self._damping(train, sums)
        damping = Damping(value * multiple, rule)
        _check_rank(sums, damping.value)
        return factor(sums.matrix, damping.value), damping

    def _damping(self, train: TrainFeatures, sums: GaussNewton) -> Damping:
        if not isinstance(self.options.damping, str):
            return Damping(self.options.damping, "as given")
        return damping_of(sums, self._trainings)


def _corrected(trains: Sequence[TrainFeatures], solved: Sequence[Solved]) -> list[TrainFeatures]:
    """Return the train set at each checkpoint, with Q times the factor of the solution."""
    return [
        train if one.factor is None else replace(train, loss_grad=train.loss_grad * one.factor.numpy())
        for train, one in zip(trains, solved, strict=True)
    ]


def _check_rank(sums: GaussNewton, damping: float) -> None:
    n, k = sums.n_train, len(sums.matrix)
    if damping == 0 and n <= k:
        raise ValueError(
            f"With damping=0 the Gauss–Newton matrix H, ({k}, {k}), of n={n} training examples is singular (condition"
            f" number inf, effective rank {effective_rank(sums.matrix):.1f}), and scores would be meaningless. Set"
            " TRAKCallback(damping='auto'), or a proj_dim well below n."
        )
