"""What retraining gave: the outputs of models trained on parts of the train set, and scores measured against them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_trak.metrics import (
    Interval,
    LinearDatamodelingScore,
    linear_datamodeling_score,
    predicted_outputs,
    spearman,
)

if TYPE_CHECKING:
    from lightning_trak.attribution import Attribution


@dataclass(frozen=True)
class GroundTruth:
    """The outputs of models that were retrained on subsets; `retrain_subsets` makes it.

    Attributes:
        masks: (s, n), bool; row t says which training examples subset t has.
        repeats: (s, r, m), the targets' outputs after each of r trainings on each subset.

    >>> truth = GroundTruth(torch.ones(4, 10, dtype=torch.bool), torch.randn(4, 2, 3))
    >>> truth.outputs.shape
    torch.Size([4, 3])
    """

    masks: Tensor
    repeats: Tensor

    def __post_init__(self) -> None:
        if self.repeats.ndim != 3 or self.masks.ndim != 2 or len(self.masks) != len(self.repeats):
            raise ValueError(
                "masks must be (s, n) and repeats (s, r, m), got"
                f" {tuple(self.masks.shape)} and {tuple(self.repeats.shape)}."
            )

    @property
    def outputs(self) -> Tensor:
        """The mean output over repeats, (s, m)."""
        return self.repeats.mean(1)

    def noise_ceiling(self) -> float | None:
        """Estimate the LDS of perfect scores, which know the expected output of every subset; None for one repeat.

        Outputs vary by chance from training to training. With ρ the rank correlation of two repeats over subsets,
        averaged over pairs and targets, the mean of r repeats has the reliability r ρ / (1 + (r − 1) ρ), and its
        correlation with the expectation is the root of that. Spearman, British Journal of Psychology 1910; Brown, ibid.
        """
        r = self.repeats.shape[1]
        if r < 2:
            return None
        pairs = [
            spearman(self.repeats[:, one], self.repeats[:, other]).mean() for one in range(r) for other in range(one)
        ]
        rho = max(0.0, torch.stack(pairs).mean().item())
        return float((r * rho / (1 + (r - 1) * rho)) ** 0.5)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write both arrays into one ``.npz`` file."""
        with open(path, "wb") as file:
            np.savez(file, masks=self.masks.numpy(), repeats=self.repeats.numpy())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GroundTruth:
        """Read what `save` wrote, or the finished subsets of a directory of `retrain_subsets`."""
        if Path(path).is_dir():
            return read_runs(Path(path))
        with np.load(path, allow_pickle=False) as arrays:
            return cls(torch.from_numpy(arrays["masks"]), torch.from_numpy(arrays["repeats"]))


@dataclass(frozen=True)
class Evaluation:
    """How well scores predict retraining; printed as a small table.

    Attributes:
        lds: the linear datamodeling score, the mean over targets.
        interval: its bootstrap confidence interval of 95 %.
        ceiling: the LDS that perfect scores would have; None where subsets were trained once only.
        random: the LDS of random scores.
        per_target: the LDS of every target, (m,).
        slope: of actual against predicted outputs over subsets, about the mean of every target; 1 for scores of the
            right size. A part α of the train set has α times its curvature, so predicted is the sum of scores / α.
    """

    lds: float
    interval: Interval
    ceiling: float | None
    random: float
    per_target: Tensor
    slope: float

    def __str__(self) -> str:
        ceiling = "unknown (repeats=1)" if self.ceiling is None else f"{self.ceiling:.3f}"
        lower, upper = (bound.item() for bound in self.interval)
        rows = (
            ("scores", f"{self.lds:.3f}  (95 %: {lower:.3f} to {upper:.3f})"),
            ("perfect scores", ceiling),
            ("random scores", f"{self.random:.3f}"),
        )
        table = "\n".join(["LDS", *(f"  {name:<15} {value}" for name, value in rows)])
        return f"{table}\nactual change / predicted change: {self.slope:.2f}"


def evaluate(attribution: Attribution | Tensor, ground_truth: GroundTruth, seed: int = 0) -> Evaluation:
    """Measure scores against retraining by the linear datamodeling score.

    Args:
        attribution: of the same train set and targets; or its scores, (n, m).
        ground_truth: from `retrain_subsets`.
        seed: of the random scores and of the bootstrap.

    Raises:
        ValueError: if numbers of training examples, targets or subsets do not fit together.

    >>> scores = torch.randn(20, 3)
    >>> masks = torch.rand(50, 20) < 0.5
    >>> truth = GroundTruth(masks, (masks.float() @ scores)[:, None])
    >>> evaluate(scores, truth).lds
    1.0
    """
    scores = attribution if isinstance(attribution, Tensor) else attribution.scores
    masks, outputs = ground_truth.masks, ground_truth.outputs
    metric = LinearDatamodelingScore(seed=seed)
    metric.update(predicted_outputs(scores, masks), outputs)
    random = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed + 2**31 - 1))
    return Evaluation(
        lds=metric.compute().item(),
        interval=metric.interval(),
        ceiling=ground_truth.noise_ceiling(),
        random=linear_datamodeling_score(random, masks, outputs).item(),
        per_target=metric.per_target(),
        slope=_slope(predicted_outputs(scores, masks) / masks.float().mean(1, keepdim=True), outputs),
    )


def _slope(predicted: Tensor, actual: Tensor) -> float:
    """Return the slope of the regression of actual on predicted values, (s, m), about the mean of every target."""
    predicted, actual = predicted - predicted.mean(0), actual - actual.mean(0)
    return ((predicted * actual).sum() / predicted.square().sum()).item()


def run_name(subset: int, repeat: int) -> str:
    """Name the run that trains on a subset for the ``repeat``-th time."""
    return f"subset{subset:05d}-repeat{repeat:02d}"


def read_runs(dirpath: Path) -> GroundTruth:
    """Read the subsets for which every repeat that any subset has is there."""
    found = {path.stem: path for path in sorted((dirpath / "runs").glob("subset*-repeat*.npz"))}
    numbers = [tuple(int(part[6:]) for part in name.split("-")) for name in found]
    if not numbers:
        raise FileNotFoundError(f"There are no finished runs in '{dirpath}'. Make them with retrain_subsets(...).")
    r = 1 + max(repeat for _, repeat in numbers)
    whole = [t for t in sorted({t for t, _ in numbers}) if all(run_name(t, i) in found for i in range(r))]
    masks, outputs = [], []
    for t in whole:
        runs = [np.load(found[run_name(t, i)], allow_pickle=False) for i in range(r)]
        masks.append(torch.from_numpy(runs[0]["mask"]))
        outputs.append(torch.stack([torch.from_numpy(run["outputs"]) for run in runs]))
    return GroundTruth(torch.stack(masks), torch.stack(outputs))
