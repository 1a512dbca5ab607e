"""Scores of a job, from its checkpoints. The store keeps them in chunks, which processes share and later calls read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.influence import (
    Estimator,
    Extremes,
    GaussNewton,
    Ranked,
    Solved,
    Spread,
    TrainFeatures,
    merged_extremes,
    sampled_rows,
)
from lightning_trak.results.stored_scores import NAME, StoredScores
from lightning_trak.store.arrays import Array
from lightning_trak.store.chunks import Chunks, shares
from lightning_trak.store.files import Damaged, check_space
from lightning_trak.trainer.attributing.job import Job
from lightning_trak.trainer.attributing.target_features import TargetFeatures
from lightning_trak.trainer.featurizing.checkpoints import naming
from lightning_trak.trainer.featurizing.train_features import checksums, sums_of
from lightning_trak.trainer.host.framework import rank_zero_warn, stop_if_asked
from lightning_trak.trainer.host.progress import progress

T = TypeVar("T")
_VERSION = 2  # of what is stored; to be raised when scores from the same features become others
_ERROR, _SAMPLE = "standard_error", "sample"  # names of arrays, as in `Spread`
_FEW = 2**24  # scores whose standard error is computed at once
_BYTES = 2**23  # of a chunk, at most
_ROWS = 2048  # in a chunk at least, if they fit: sparse products need many rows
_PRODUCTS = 2**34  # multiplications for a chunk, about a second's work; reading a number takes as long as 128 of them
_PART = 256  # times k training examples have k extremes at least, which then take a fortieth of what their scores take


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


Parts = Mapping[str, Array]  # arrays of some training examples, by name
Forms = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]  # their shapes and types


class Work(NamedTuple):
    """Numbers of all training examples, to be computed in chunks.

    Attributes:
        what: names them.
        size: how many training examples a chunk has.
        compute: returns the arrays of some training examples.
        forms: returns shapes and types of these arrays, by name.
        whole: the names of those that have no row for each training example.
    """

    what: str
    size: int
    compute: Callable[[range], Parts]
    forms: Callable[[range], Forms]
    whole: Sequence[str] = ()


@dataclass(frozen=True)
class Scoring:
    """Computes the scores of targets, averaged over checkpoints, or reads those that are stored.

    Attributes:
        job: the checkpoints.
        estimator: computes scores.
        solved: what it returned at each checkpoint.
        targets: the targets.
        weights: what ``solved`` depends on besides targets and options; JSON can hold it.
    """

    job: Job
    estimator: Estimator
    solved: Sequence[Solved]
    targets: TargetFeatures
    weights: Any = None

    def scores(self) -> tuple[Tensor | StoredScores, Spread | None]:
        """Return τ, (n, m), on disk if it is larger than the memory limit; and how scores vary, if they are few."""
        few = _with_spread(self._n, self._m, len(self.solved), self.job.memory_limit)

        def compute(rows: range) -> Parts:
            mean, spread = self.estimator.scores(self.solved, spread=few, rows=rows)
            own = {} if spread is None else {_ERROR: spread.standard_error.numpy(), _SAMPLE: spread.sample.numpy()}
            return {NAME: mean.numpy(), **own}

        work = self._of_scores("scores", [NAME, _ERROR] if few else [NAME], compute, sample=few)
        if self._large:
            return StoredScores(self._filled(work), self._m), None
        found = self._in_memory(work)
        return found[NAME], Spread(found[_ERROR], found[_SAMPLE]) if few else None

    def spread(self) -> Spread:
        """Return how scores vary from checkpoint to checkpoint."""

        def compute(rows: range) -> Parts:
            spread = self.estimator.scores(self.solved, rows=rows).spread
            assert spread is not None  # there are several checkpoints
            return {NAME: spread.standard_error.numpy(), _SAMPLE: spread.sample.numpy()}

        work = self._of_scores("standard error", [NAME], compute, sample=True)
        if not self._large:
            found = self._in_memory(work)
            return Spread(found[NAME], found[_SAMPLE])
        chunks = self._filled(work)
        samples = [torch.from_numpy(_read(chunks, rows, work)[_SAMPLE]) for rows in chunks.all()]
        return Spread(StoredScores(chunks, self._m), torch.cat(samples, 1))

    def extremes(self, k: int) -> Extremes:
        """Return the k highest and lowest scores of each target; no (n, m) matrix is made."""

        def compute(rows: range) -> Parts:
            found = self.estimator.extremes(self.solved, k, rows=rows)
            sides = found.top, found.bottom
            return {
                "indices": torch.stack([side.indices for side in sides]).numpy(),
                "values": torch.stack([side.values for side in sides]).numpy(),
            }

        def forms(rows: range) -> Forms:
            shape = 2, self._m, min(k, len(rows))
            return {"indices": (shape, np.int64), "values": (shape, np.float32)}

        work = Work(f"extremes {k}", max(_PART * k, self._rows_of_work), compute, forms, ("indices", "values"))
        found = []
        for _, arrays in self._parts(work):
            indices, values = (torch.from_numpy(arrays[name]) for name in ("indices", "values"))
            found.append(Extremes(*(Ranked(*side) for side in zip(indices, values, strict=True))))
        return merged_extremes(found, min(k, self._n))

    @property
    def _n(self) -> int:
        return self.job.store.n_train

    @property
    def _m(self) -> int:
        return len(self.targets.outputs)

    @property
    def _large(self) -> bool:
        """Whether scores are too many for memory."""
        return 4 * self._n * self._m > self.job.memory_limit

    @property
    def _rows_of_work(self) -> int:
        """How many training examples' scores are about a second's work."""
        each = min(2048, self.estimator.trains[0].shape[1]) * len(self.solved) * (self._m + 128)
        return max(_ROWS, _PRODUCTS // each)

    def _of_scores(self, what: str, names: Sequence[str], compute: Callable[[range], Parts], *, sample: bool) -> Work:
        """Return the work of matrices (n, m), and of the ``sample`` of a `Spread`."""

        def forms(rows: range) -> Forms:
            found = dict.fromkeys(names, ((len(rows), self._m), np.float32))
            sampled = len(self.solved), len(sampled_rows(self._n, rows)), self._m
            return {**found, **({_SAMPLE: (sampled, np.float32)} if sample else {})}

        size = max(1, min(self._rows_of_work, _BYTES // (4 * self._m)))
        return Work(what, size, compute, forms, (_SAMPLE,) if sample else ())

    def _in_memory(self, work: Work) -> dict[str, Tensor]:
        """Return the whole of all arrays."""
        names = set(work.forms(range(1))) - set(work.whole)
        found, samples = {name: torch.empty(self._n, self._m) for name in names}, []
        for rows, arrays in self._parts(work):
            for name, whole in found.items():
                whole[rows.start : rows.stop] = torch.from_numpy(arrays[name])
            samples += [torch.tensor(arrays[name]) for name in work.whole]
        return found | ({_SAMPLE: torch.cat(samples, 1)} if samples else {})

    def _parts(self, work: Work) -> Iterator[tuple[range, Parts]]:
        """Yield the arrays of each chunk. The store keeps them if it keeps the targets."""
        if self.targets.kept:
            try:
                chunks = self._filled(work)
            except OSError as error:  # a full disk, for example
                rank_zero_warn(f"Scores could not be stored and will be computed again: {error}")
            else:
                yield from ((rows, _read(chunks, rows, work)) for rows in chunks.all())
                return
        starts = range(0, self._n, work.size)
        with progress(self.job.trainer, "Scoring", len(starts)) as advance:
            for start in starts:
                rows = range(start, min(start + work.size, self._n))
                yield rows, work.compute(rows)
                advance(1)

    def _filled(self, work: Work) -> Chunks:
        """Return the chunks of all rows, after computing those that are not in the store yet."""
        job = self.job
        chunks = job.store.score_chunks(self.targets.digest, self._key(work), work.size, work.whole)
        missing = chunks.missing()
        if missing:
            chunks.folder.parent.mkdir(parents=True, exist_ok=True)
            check_space(job.store.dirpath, sum(_size(work.forms(rows)) for rows in missing))
            with progress(job.trainer, "Scoring", len(missing)) as advance:
                for claim, own in shares(chunks, lambda: stop_if_asked(job.trainer)):
                    for rows in own:
                        stop_if_asked(job.trainer)
                        claim.write_whole(rows.start, work.compute(rows))
                        advance(1)
        return chunks

    def _key(self, work: Work) -> str:
        """Return all that the arrays depend on besides the targets."""
        estimator, entries = self.estimator, self.job.entries
        of = {
            "version": _VERSION,
            "what": (work.what, *sorted(work.forms(range(1))), work.size, self._n),
            "features": [(entry.place, entry.derived.name, entry.meta.get("training_time")) for entry in entries],
            "terms": [checksums(train) for train in estimator.trains],
            "dampings": [one.damping.value for one in self.solved],
            "options": vars(estimator.options) | {"temperature": estimator.temperature},
            "weights": self.weights,
        }
        return json.dumps(of, sort_keys=True)


def _with_spread(n: int, m: int, checkpoints: int, limit: float) -> bool:
    """Say whether standard errors are computed with the scores."""
    return checkpoints > 1 and n * m <= min(_FEW, limit / 4)


def bytes_of_scores(n: int, m: int, checkpoints: int, limit: float) -> tuple[int, int]:
    """Return how many bytes scores take on the disk, and in memory.

    >>> bytes_of_scores(1000, 10, checkpoints=1, limit=4e9), bytes_of_scores(10**6, 10**4, checkpoints=1, limit=4e9)
    ((40000, 40000), (40000000000, 0))
    """
    scores = 4 * n * m
    if not _with_spread(n, m, checkpoints, limit):
        return scores, scores if scores <= limit else 0
    both = 2 * scores
    return both + 4 * checkpoints * len(sampled_rows(n, range(n))) * m, both


def _size(forms: Forms) -> int:
    """Return the bytes of some arrays."""
    return sum(prod(shape) * np.dtype(kind).itemsize for shape, kind in forms.values())


def _read(chunks: Chunks, rows: range, work: Work) -> Mapping[str, Array]:
    """Return the arrays of a chunk; if it is damaged, they are computed again."""
    try:
        arrays = chunks.read(rows)
        found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        if found == {name: (shape, np.dtype(kind)) for name, (shape, kind) in work.forms(rows).items()}:
            return arrays
        why = "it has other arrays than were written"
    except Damaged as error:
        why = error.why
    rank_zero_warn(f"'{chunks.path(rows.start)}' is damaged: {why}. It is computed again.")
    computed = dict(work.compute(rows))
    chunks.write(rows.start, computed)
    return computed
