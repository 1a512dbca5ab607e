"""What is solved or computed at one checkpoint after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning_trak.influence import Damping, Estimator, GaussNewton, Solved, TrainFeatures
from lightning_trak.trainer.attributing.job import Job
from lightning_trak.trainer.featurizing.checkpoints import naming
from lightning_trak.trainer.featurizing.train_features import sums_of
from lightning_trak.trainer.host.progress import progress

T = TypeVar("T")


def at_each_checkpoint(
    job: Job,
    estimator: Estimator,
    description: str,
    compute: Callable[[int, TrainFeatures, GaussNewton | None], T],
) -> list[T]:
    """Call ``compute`` with (number, train set, sums over the train set) of each checkpoint; return the results."""
    results = []
    with progress(job.trainer, description, len(job.entries)) as advance:
        for number, (entry, train) in enumerate(zip(job.entries, estimator.trains, strict=True)):
            with naming(entry):
                results.append(compute(number, train, sums_of(entry, estimator, train)))
            advance(1)
    return results


def solved_at_each(job: Job, estimator: Estimator, targets: Sequence[Any]) -> list[Solved]:
    """Return what `Estimator.solve` returns at each checkpoint for the targets' features there."""

    def solve(number: int, train: TrainFeatures, sums: GaussNewton | None) -> Solved:
        return estimator.solve(train, targets[number], sums)

    return at_each_checkpoint(job, estimator, "Solving", solve)


def dampings_at_each(job: Job, estimator: Estimator) -> list[Damping]:
    """Return λ at each checkpoint."""
    return at_each_checkpoint(job, estimator, "Damping", lambda _, train, sums: estimator.damping(train, sums))
