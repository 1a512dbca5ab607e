"""How well two halves of the checkpoints agree, for more and more of them."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.metrics import spearman
from lightning_trak.results.plots.curves import plot_convergence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_MOST = 100  # targets that are compared for one number


class Convergence(NamedTuple):
    """How well two halves of the checkpoints agree.

    Attributes:
        checkpoints: numbers of checkpoints that were split into halves.
        agreement: for each number, the rank correlation of the halves' scores.

    >>> figure, ax = Convergence([2, 4], [0.5, 0.75]).plot()
    >>> ax.lines[0].get_ydata().tolist()
    [0.5, 0.75]
    >>> import matplotlib.pyplot as plt
    >>> plt.close(figure)
    """

    checkpoints: list[int]
    agreement: list[float]

    def plot(self, ax: Any = None) -> tuple[Figure, Axes]:
        """Draw the agreement over the number of checkpoints.

        Args:
            ax: Axes of matplotlib to draw into; None for a new figure.

        Returns:
            The figure and its Axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
            TypeError: if ``ax`` is no Axes.
        """
        return plot_convergence(self.checkpoints, self.agreement, ax)


def convergence_of(sample: Tensor, splits: int = 20, seed: int = 0) -> Convergence:
    """Return how well halves of the checkpoints agree, from the scores at each, (checkpoints, r, m)."""
    numbers = list(range(2, len(sample) + 1, 2))
    return Convergence(numbers, [agreement_of(sample, number, splits, seed) for number in numbers])


def agreement_of(sample: Tensor, number: int, splits: int, seed: int) -> float:
    """Return how well the scores of two halves of some checkpoints agree.

    Args:
        sample: scores at each checkpoint, (checkpoints, r, m).
        number: of checkpoints that are drawn and split into halves; even.
        splits: the number of random splits.
        seed: of the splits.

    Returns:
        Spearman's rank correlation over training examples, averaged over targets and splits.

    >>> agreement_of(torch.arange(12.0).reshape(2, 6, 1), 2, splits=3, seed=0)
    1.0
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randperm(len(sample), generator=generator)[:number].tolist() for _ in range(splits))
    times = Counter(frozenset(tuple(sorted(half)) for half in (one[::2], one[1::2])) for one in drawn)
    agreement = {halves: spearman(*(sample[list(half)].mean(0) for half in halves)).mean().item() for halves in times}
    return sum(agreement[halves] * often for halves, often in times.items()) / splits


def agreement_of_all(sample: Tensor | None) -> float | None:
    """Return the agreement of two halves of all checkpoints; None where it is unknown.

    Of many targets some are compared, evenly spaced.
    """
    if sample is None or len(sample) < 2 or sample.shape[1] < 2 or sample.shape[2] < 1:
        return None
    few = sample[:, :, :: math.ceil(sample.shape[2] / _MOST)]
    return agreement_of(few, len(sample) // 2 * 2, splits=20, seed=0)
