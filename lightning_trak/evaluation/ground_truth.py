"""The ground truth of retraining on subsets, and the evaluation of scores against it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from lightning_trak.metrics import (
    Interval,
    LinearDatamodelingScore,
    linear_datamodeling_score,
    predicted_outputs,
    spearman,
)
from lightning_trak.results.attribution import Attribution
from lightning_trak.results.plots.curves import plot_lds
from lightning_trak.store.arrays import read_arrays, write_arrays
from lightning_trak.store.files import Damaged, read_json, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRUTH = "ground truth"


@dataclass(frozen=True)
class GroundTruth:
    """The outputs of models that were retrained on subsets; made by `retrain_subsets`.

    Attributes:
        masks: (s, n), bool; row t says which training examples are in subset t.
        repeats: (s, r, m), the outputs of the targets after each of r trainings on each subset.

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
        """Estimate the noise ceiling: the highest LDS that scores can reach, given the noise of training.

        Outputs vary by chance from training to training. The ceiling is the LDS of scores that predict the expected
        output for every subset. Let ρ be the rank correlation of two repeats over subsets, averaged over pairs of
        repeats and over targets. The mean of r repeats then has the reliability r ρ / (1 + (r − 1) ρ). The ceiling is
        the square root of it (Spearman, British Journal of Psychology 1910; Brown, ibid.).

        Returns:
            The ceiling; None with a single repeat.
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
        """Write masks and repeats into one safetensors file."""
        write_arrays(Path(path), {"masks": self.masks.numpy(), "repeats": self.repeats.numpy()}, _TRUTH)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GroundTruth:
        """Read what `save` wrote, or a directory of `retrain_subsets`.

        A directory may have more repeats of some subsets than of others. Then s subsets with r repeats each are read,
        with s and r such that most runs are used, and a warning says so.

        Raises:
            FileNotFoundError: if there is nothing.
            ValueError: if a file is damaged; the message names it.
        """
        if Path(path).is_dir():
            return read_runs(Path(path))
        if not Path(path).exists():
            raise FileNotFoundError(
                f"There is no ground truth in '{path}'. Make it with retrain_subsets(...), and save it there."
            )
        try:
            return cls(*_read_tensors(Path(path), _TRUTH, "masks", "repeats"))
        except Damaged as error:
            raise Damaged(error.path, error.why, "Save the ground truth again.") from error


@dataclass(frozen=True)
class Evaluation:
    """How well scores predict retraining; ``print`` shows a small table.

    Attributes:
        lds: the linear datamodeling score, the mean over targets.
        interval: its 95 % bootstrap confidence interval.
        ceiling: the noise ceiling, see `GroundTruth.noise_ceiling`; None with one training per subset.
        random: the LDS of random scores.
        per_target: the LDS of every target, (m,).
        slope: the slope of actual against predicted outputs over subsets, both centred per target; 1 for scores of the
            right size. The prediction is the sum of scores / α for a subset with a part α of the train set, since it
            has α times the curvature.
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
            ("noise ceiling", ceiling),
            ("random scores", f"{self.random:.3f}"),
        )
        table = "\n".join(["LDS", *(f"  {name:<15} {value}" for name, value in rows)])
        return f"{table}\nactual change / predicted change: {self.slope:.2f}"

    def plot(self, ax: Any = None) -> tuple[Figure, Axes]:
        """Draw the LDS of every target, and their mean with its interval, the noise ceiling and random scores.

        Args:
            ax: Axes of matplotlib to draw into; None for a new figure.

        Returns:
            The figure and its Axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
            TypeError: if ``ax`` is no Axes.
        """
        lower, upper = (bound.item() for bound in self.interval)
        return plot_lds(self.lds, (lower, upper), self.ceiling, self.random, self.per_target, ax)


def evaluate(attribution: Attribution | Tensor, ground_truth: GroundTruth, seed: int = 0) -> Evaluation:
    """Measure scores against retraining by the linear datamodeling score.

    Args:
        attribution: scores of the same train set and targets, as an `Attribution` or a tensor, (n, m).
        ground_truth: from `retrain_subsets`.
        seed: the seed of the random scores and of the bootstrap.

    Raises:
        ValueError: if the numbers of training examples, targets or subsets do not fit together.

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
    """Return the slope of the regression of actual on predicted values, (s, m), both centred per target."""
    predicted, actual = predicted - predicted.mean(0), actual - actual.mean(0)
    return ((predicted * actual).sum() / predicted.square().sum()).item()


def run_name(subset: int, repeat: int) -> str:
    """Return the name of a run: a subset and its repeat."""
    return f"subset{subset:05d}-repeat{repeat:02d}"


def write_run(path: Path, mask: Tensor, outputs: Tensor) -> None:
    """Store a run, whole or not at all: its training examples (n,), and the outputs of the targets (m,)."""
    write_arrays(path, {"mask": mask.numpy(), "outputs": outputs.numpy()}, path.stem)


def read_run(path: Path, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mask and the outputs of a run; ``mask``, (n,), are the training examples that it must have, if known.

    Raises:
        Damaged: if the file is damaged, or the run trained on other examples.
    """
    stored, outputs = _read_tensors(path, path.stem, "mask", "outputs")
    if stored.ndim != 1 or outputs.ndim != 1:
        shapes = f"mask {tuple(stored.shape)} and outputs {tuple(outputs.shape)}, expected (n,) and (m,)"
        raise Damaged(path, f"it has {shapes}")
    if mask is not None and not torch.equal(stored, mask):
        raise Damaged(path, "it is the run of another subset, which trained on other examples than its name says")
    return stored, outputs


def read_runs(dirpath: Path) -> GroundTruth:
    """Read the runs of a directory: s subsets with r repeats each, with s and r such that most runs are used.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if a file is damaged, or belongs to another subset; the message names it.
    """
    paths = {path.stem: path for path in (dirpath / "runs").glob("subset*-repeat*.safetensors")}
    subsets, r = _largest_grid(set(paths))
    if not subsets:
        raise FileNotFoundError(f"There are no finished runs in '{dirpath}'. Make them with retrain_subsets(...).")
    asked = max(len(paths), _asked(dirpath))
    if asked > len(subsets) * r:
        missing = f" of the {asked} that retrain_subsets was asked for" if asked > len(paths) else ""
        warnings.warn(
            f"'{dirpath}' has {len(paths)} runs{missing}; {len(subsets)} subsets with {r} repeats each were read, the"
            " most that are complete. Choose others, or make the missing ones, with retrain_subsets(...,"
            " n_subsets=..., repeats=...).",
            stacklevel=3,
        )
    try:
        masks = {t: read_run(paths[run_name(t, 0)])[0] for t in subsets}
        runs = {(t, i): read_run(paths[run_name(t, i)], masks[t])[1] for t in subsets for i in range(r)}
    except Damaged as error:
        raise Damaged(error.path, error.why, f"retrain_subsets(..., dirpath='{dirpath}') runs it again.") from error
    check_targets({run_name(*key): outputs for key, outputs in runs.items()}, dirpath)
    repeats = [torch.stack([runs[t, i] for i in range(r)]) for t in subsets]
    return GroundTruth(torch.stack(list(masks.values())), torch.stack(repeats))


def note_asked(dirpath: Path, n_subsets: int, repeats: int) -> None:
    """Note how many runs were asked for, so that a file that is lost later is missed. A larger number stays."""
    with FileLock(dirpath / "asked.lock"):
        with suppress(ValueError):
            if _asked(dirpath) >= n_subsets * repeats:
                return
        write_json(dirpath / "asked.json", {"runs": n_subsets * repeats})


def _asked(dirpath: Path) -> int:
    """Return how many runs were asked for; 0 where that is unknown."""
    path = dirpath / "asked.json"
    if not path.exists():
        return 0
    remedy = "Call retrain_subsets(...) again: what is finished is not run again."
    runs = read_json(path, remedy).get("runs")
    if type(runs) is not int or runs < 1:
        raise Damaged(path, f"its number of runs is {runs!r}", remedy)
    return runs


def check_targets(outputs: Mapping[str, Tensor], dirpath: str | os.PathLike[str]) -> None:
    """Raise a ValueError if runs, by name, have different numbers of targets."""
    first = next(iter(outputs))
    for name, values in outputs.items():
        if values.shape != outputs[first].shape:
            raise ValueError(
                f"Runs in '{dirpath}' are of other targets: '{first}' has outputs of {len(outputs[first])} targets,"
                f" '{name}' of {len(values)}. Use another dirpath for other targets."
            )


def _largest_grid(names: set[str]) -> tuple[list[int], int]:
    """Return subsets that all have the repeats 0 to r − 1, and r, such that most runs are used.

    >>> _largest_grid({run_name(0, 0), run_name(0, 1), run_name(1, 0), run_name(2, 0)})
    ([0, 1, 2], 1)
    """
    found = [re.fullmatch(r"subset(\d+)-repeat(\d+)", name) for name in names]
    numbers = [(int(match[1]), int(match[2])) for match in found if match]  # copies of files have other names
    best: tuple[list[int], int] = ([], 1)
    for r in range(1, 2 + max((repeat for _, repeat in numbers), default=-1)):
        whole = [t for t in sorted({t for t, _ in numbers}) if all(run_name(t, i) in names for i in range(r))]
        if len(whole) * r >= len(best[0]) * best[1]:
            best = whole, r
    return best


def _read_tensors(path: Path, place: str, *names: str) -> list[Tensor]:
    arrays = read_arrays(path, place, names)
    return [torch.from_numpy(arrays[name]) for name in names]
