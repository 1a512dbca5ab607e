"""Retraining without the most helpful examples, and without as many random ones as a control."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.evaluation.retraining import Runs, draw_removed
from lightning_trak.results.attribution import Attribution
from lightning_trak.results.plots.curves import plot_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Counterfactuals:
    """The outputs of targets after training without their most helpful examples; made by `counterfactuals`.

    Attributes:
        targets: the t targets, by column of the scores.
        k: the numbers of removed training examples, ascending.
        before: (r, t), outputs after training on the whole train set, for each of r repeats.
        removed: (len(k), r, t), outputs without each target's own k most helpful examples.
        random: (len(k), r, t), outputs without k examples drawn at random, the control.
    """

    targets: tuple[int, ...]
    k: tuple[int, ...]
    before: Tensor
    removed: Tensor
    random: Tensor

    @property
    def drop(self) -> Tensor:
        """By how much the output fell without the most helpful examples, (len(k), t), averaged over repeats."""
        return self.before.mean(0) - self.removed.mean(1)

    @property
    def random_drop(self) -> Tensor:
        """By how much the output fell without random examples, (len(k), t), averaged over repeats."""
        return self.before.mean(0) - self.random.mean(1)

    @property
    def flipped(self) -> Tensor:
        """Whether the output changed its sign, (len(k), t). For log-odds: whether p crossed one half."""
        return (self.before.mean(0) > 0) != (self.removed.mean(1) > 0)

    @property
    def random_flipped(self) -> Tensor:
        """Whether the output changed its sign without random examples, (len(k), t)."""
        return (self.before.mean(0) > 0) != (self.random.mean(1) > 0)

    def __str__(self) -> str:
        lines = [f"Means over {len(self.targets)} targets, {len(self.before)} trainings each"]
        lines.append(f"{'removed':>8} {'fall of output':>15} {'random':>8} {'flipped':>8} {'random':>8}")
        columns = (self.drop, self.random_drop, self.flipped.float(), self.random_flipped.float())
        for row, k in enumerate(self.k):
            drop, random_drop, flipped, random_flipped = (column[row].mean().item() for column in columns)
            lines.append(f"{k:>8} {drop:>15.3f} {random_drop:>8.3f} {flipped:>8.0%} {random_flipped:>8.0%}")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> tuple[Figure, Any]:
        """Draw the fall of the output, and the share of flipped targets, over the number of removed examples.

        Args:
            ax: two Axes of matplotlib to draw into, as an array or a list; None for a new figure.

        Returns:
            The figure, and both Axes as a NumPy array, (2,).

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
            TypeError: if ``ax`` has something else than Axes.
            ValueError: if there are not two.
        """
        panels = {
            "fall of the output": {"most helpful": self.drop.mean(1), "random": self.random_drop.mean(1)},
            "share of targets flipped": {
                "most helpful": self.flipped.float().mean(1),
                "random": self.random_flipped.float().mean(1),
            },
        }
        return plot_curves(self.k, panels, "training examples removed", ax)


def counterfactuals(
    attribution: Attribution,
    make_module: Callable[[], Any],
    datamodule: Any,
    make_trainer: Callable[[], Any],
    targets: Sequence[int],
    k: Sequence[int] = (10, 20, 40),
    repeats: int = 3,
    seed: int = 0,
    dirpath: str | os.PathLike[str] = "counterfactuals",
    *,
    dataloaders: DataLoader[Any] | None = None,
) -> Counterfactuals:
    """Remove the k most helpful training examples of a target, retrain, and measure how its output changes.

    There are ``repeats · (1 + len(k) · (1 + len(targets)))`` trainings. Each is stored in ``dirpath`` as it ends, and
    several processes may share them, as in `retrain_subsets`. See TRAK, arXiv 2303.14186, Section 5. The curve is the
    brittleness test of "Datamodels", arXiv 2202.00622, Section 4.1.

    Args:
        attribution: scores of the same train set and targets.
        make_module: returns a new LightningModule.
        datamodule: supplies train set and targets, as for `retrain_subsets`.
        make_trainer: returns a new Trainer, as for `retrain_subsets`.
        targets: the targets, by column of the scores.
        k: the numbers of examples to remove.
        repeats: the number of trainings on each remaining set.
        seed: the seed of the trainings and of the control.
        dirpath: where the runs are stored.
        dataloaders: the targets, if not those of the datamodule.

    Raises:
        ValueError: if a target or a k is out of range, or the directory has runs with other data or settings.
    """
    n, m = attribution.info.n_train, attribution.info.n_targets
    sizes = tuple(sorted({int(size) for size in k}))
    if not sizes or sizes[0] < 1 or sizes[-1] >= n:
        raise ValueError(f"k must be numbers from 1 to {n - 1}, got {list(k)}.")
    if not targets or not all(0 <= target < m for target in targets):
        raise ValueError(f"targets must be columns of the scores, 0 to {m - 1}, got {list(targets)}.")
    runs = Runs(make_module, datamodule, make_trainer, dirpath, dataloaders, {"seed": seed})
    if runs.n_train != n:
        raise ValueError(f"The scores are of {n} training examples, but the datamodule's train set has {runs.n_train}.")
    best = attribution.top(sizes[-1]).indices
    everything = torch.ones(n, dtype=torch.bool)
    plan = {"before": [everything] * repeats}
    for size in sizes:
        plan[f"random {size}"] = [draw_removed(n, size, seed, repeat) for repeat in range(repeats)]
        for target in targets:
            without = everything.clone()
            without[best[target, :size]] = False
            plan[f"{target} {size}"] = [without] * repeats
    jobs = {what: [_job(mask, seed, repeat) for repeat, mask in enumerate(masks)] for what, masks in plan.items()}
    each = {job[0]: job for group in jobs.values() for job in group}
    found = runs.complete(list(each.values()), "Retraining without")

    def outputs(what: str) -> Tensor:
        return torch.stack([found[name] for name, _, _ in jobs[what]])

    columns = list(targets)
    removed = [torch.stack([outputs(f"{target} {size}")[:, target] for target in targets], 1) for size in sizes]
    control = [outputs(f"random {size}")[:, columns] for size in sizes]
    before = outputs("before")[:, columns]
    return Counterfactuals(tuple(columns), sizes, before, torch.stack(removed), torch.stack(control))


def _job(mask: Tensor, seed: int, repeat: int) -> tuple[str, Tensor, str]:
    """Name a run by what it trains on, so that the same training is run only once."""
    digest = hashlib.blake2b(mask.numpy().tobytes(), digest_size=8).hexdigest()
    return f"without{len(mask) - int(mask.sum())}-{digest}-repeat{repeat:02d}", mask, f"{seed}:{repeat}"
