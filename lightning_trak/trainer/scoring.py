"""Scores of a job, from its checkpoints: in memory, or in chunks on disk if they are large."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from lightning_trak.influence import Estimator, GaussNewton, Scores, Solved, Spread, TrainFeatures
from lightning_trak.results.stored_scores import NAME, StoredScores
from lightning_trak.store.chunks import Chunks, shares
from lightning_trak.store.files import check_space
from lightning_trak.trainer.checkpoints import naming
from lightning_trak.trainer.job import Job
from lightning_trak.trainer.progress import progress
from lightning_trak.trainer.train_features import sums_of

T = TypeVar("T")
_VERSION = 1  # of what is stored; to be raised when scores from the same features become others
_FEW = 2**24  # scores that one process computes in no time, with their standard error
_CHUNK_BYTES = 2**23


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


def compute_scores(
    job: Job, estimator: Estimator, solved: Sequence[Solved], targets: str, weights: Any = None
) -> tuple[Tensor | StoredScores, Spread | None]:
    """Return τ, (n, m), averaged over checkpoints; and how scores vary, if they are few.

    Args:
        job: the checkpoints.
        estimator: computes scores.
        solved: what it returned at each checkpoint.
        targets: a digest of the targets.
        weights: what ``solved`` depends on besides targets and options; JSON can hold it.
    """
    n, m = job.store.n_train, len(solved[0].vectors)
    large, shared = 4 * n * m > job.memory_limit, job.trainer.world_size > 1 and n * m > _FEW
    if not large and not shared:
        return _in_memory(job, estimator, solved, spread=n * m <= _FEW)
    stored = _stored(job, estimator.score_rows(solved), m, targets, _key(job, estimator, solved, weights))
    return stored if large else stored[:], None


def compute_spread(job: Job, estimator: Estimator, solved: Sequence[Solved], targets: str) -> Spread:
    """Return how scores vary from checkpoint to checkpoint; see `compute_scores`."""
    n, m = job.store.n_train, len(solved[0].vectors)
    if 4 * n * m <= job.memory_limit:
        spread = _in_memory(job, estimator, solved, spread=True).spread
        assert spread is not None  # there are several checkpoints
        return spread
    key = _key(job, estimator, solved, "standard error")
    errors = _stored(job, estimator.score_rows(solved, spread=True), m, targets, key)
    return Spread(errors, estimator.sample(solved))


def _in_memory(job: Job, estimator: Estimator, solved: Sequence[Solved], *, spread: bool) -> Scores:
    with progress(job.trainer, "Scoring", len(estimator.trains[0].slices(len(solved[0].vectors)))) as advance:
        return estimator.scores(solved, lambda: advance(1), spread=spread)


def _key(job: Job, estimator: Estimator, solved: Sequence[Solved], weights: Any) -> str:
    """Return all that scores depend on besides the targets."""
    options = vars(estimator.options) | {"temperature": estimator.temperature}
    dampings = [one.damping.value for one in solved]
    places = [(entry.place, entry.derived.name) for entry in job.entries]
    return json.dumps([_VERSION, places, options, dampings, weights], sort_keys=True)


def _stored(job: Job, of_rows: Callable[[slice], Tensor], m: int, targets: str, key: str) -> StoredScores:
    """Compute numbers, (n, m), that are not in the store yet."""
    n, size = job.store.n_train, max(1, _CHUNK_BYTES // (4 * m))
    folder = job.store.targets_folder(targets) / f"scores-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
    chunks = Chunks(folder, f"{targets}|{key}", n, min(n, size))
    missing = chunks.missing()
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(job.store.dirpath, 4 * m * sum(map(len, missing)))
    with progress(job.trainer, "Scoring", len(missing)) as advance:
        for claim, own in shares(chunks):
            for rows in own:
                claim.write(rows, {NAME: of_rows(slice(rows.start, rows.stop)).numpy()})
                advance(1)
    return StoredScores(chunks, m)
