"""How well two halves of the checkpoints agree, for more and more of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from lightning_trak.results.plots.curves import plot_convergence
from lightning_trak.results.status import agreement_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
