"""Scores of a job, from its checkpoints. The store keeps them in chunks, which processes share and later calls read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.influence import (
    SUMS_VERSION,
    Damping,
    Estimator,
    Extremes,
    Ranked,
    Solved,
    Spread,
    merged_extremes,
    rows_of_sample,
)
from lightning_trak.results.stored_scores import NAME, StoredScores
from lightning_trak.store.arrays import Array
from lightning_trak.store.background import in_background
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.chunks import Chunks, shares
from lightning_trak.store.files import Damaged, check_space
from lightning_trak.trainer.attributing.job import Job
from lightning_trak.trainer.attributing.solving import dampings_at_each
from lightning_trak.trainer.attributing.target_features import TargetFeatures
from lightning_trak.trainer.featurizing.checkpoints import say_waiting
from lightning_trak.trainer.featurizing.train_features import checksums
from lightning_trak.trainer.host.framework import rank_zero_warn, stop_if_asked
from lightning_trak.trainer.host.progress import progress

_VERSION = 2  # of what is stored; to be raised when scores from the same features become others
_ERROR, _SAMPLE = "standard_error", "sample"  # names of arrays, as in `Spread`
_FEW = 2**24  # scores whose standard error is computed at once
_BYTES_ON_DISK = 2**23  # of a chunk, at most, from which scores are read when they are asked for
_BYTES = 2**24  # of another: memory for more than 32 MiB is new each time, and slow
_BYTES_OF_SPARSE = 2**26  # of another with sparse features, whose products are faster the more rows they have
_ROWS = 2048  # in a chunk at least, if they take no minute
_PRODUCTS = 2**34  # multiplications in about a second; to read a number takes as long as 128 of them
_SPARSE = 2**14  # that a product of sparse features takes as long as
_ROWS_OF_EXTREME = 256  # in a chunk, for each extreme that is kept: these are a fortieth of all scores then
_FEWEST = 16  # at least, whatever time they take


Parts = Mapping[str, Array]  # arrays of some training examples, by name
Forms = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]  # their shapes and types


class Work(NamedTuple):
    """Arrays that are computed in chunks, each of some training examples.

    Attributes:
        what: what they hold.
        size: how many training examples a chunk has.
        compute: returns the arrays of some training examples.
        forms: returns shapes and types of these arrays, by name.
        per_chunk: the names of those that have no row for each training example.
    """

    what: str
    size: int
    compute: Callable[[range], Parts]
    forms: Callable[[range], Forms]
    per_chunk: Sequence[str] = ()


@dataclass(frozen=True)
class Scoring:
    """Computes the scores of targets, averaged over checkpoints, or reads those that are stored.

    Attributes:
        job: the checkpoints.
        estimator: computes scores.
        targets: the targets.
        solve: returns what the estimator solves at each checkpoint; it is called only if scores are to be computed.
        weights: what that depends on besides targets and options; JSON can hold it.
    """

    job: Job
    estimator: Estimator
    targets: TargetFeatures
    solve: Callable[[], Sequence[Solved]]
    weights: Any = None

    @cached_property
    def solved(self) -> Sequence[Solved]:
        """What the estimator solved at each checkpoint."""
        return self.solve()

    @property
    def dampings(self) -> list[Damping]:
        """λ at each checkpoint."""
        if "solved" in vars(self):
            return [one.damping for one in self.solved]
        return dampings_at_each(self.job, self.estimator)

    def scores(self, *, spread: bool = True) -> tuple[Tensor | StoredScores, Spread | None]:
        """Return τ, (n, m), on disk if it is larger than the memory limit; and how scores vary, if they are few."""
        few = spread and _with_spread(self._n, self._m, len(self.job.entries), self.job.memory_limit)

        def compute(rows: range) -> Parts:
            mean, spread = self.estimator.scores(self.solved, self._stop, spread=few, rows=rows)
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
            spread = self.estimator.scores(self.solved, self._stop, rows=rows).spread
            assert spread is not None  # there are several checkpoints
            return {NAME: spread.standard_error.numpy(), _SAMPLE: spread.sample.numpy()}

        work = self._of_scores("standard error", [NAME], compute, sample=True)
        if not self._large:
            found = self._in_memory(work)
            return Spread(found[NAME], found[_SAMPLE])
        chunks = self._filled(work)
        with_some = (rows for rows in chunks.all() if len(rows_of_sample(self._n, rows)))
        samples = [torch.tensor(_read(chunks, rows, work)[_SAMPLE]) for rows in with_some]
        return Spread(StoredScores(chunks, self._m), torch.cat(samples, 1))

    def extremes(self, k: int) -> Extremes:
        """Return the k highest and lowest scores of each target; no (n, m) matrix is made."""

        def compute(rows: range) -> Parts:
            found = self.estimator.extremes(self.solved, k, self._stop, rows=rows)
            sides = found.top, found.bottom
            return {
                "indices": torch.stack([side.indices for side in sides]).numpy(),
                "values": torch.stack([side.values for side in sides]).numpy(),
            }

        def forms(rows: range) -> Forms:
            shape = 2, self._m, min(k, len(rows))
            return {"indices": (shape, np.int64), "values": (shape, np.float32)}

        size = self._rows_of_a_chunk(_ROWS_OF_EXTREME * k, _FEWEST * k)
        found: Extremes | None = None
        work = Work(f"extremes {k}", size, compute, forms, ("indices", "values"))
        for _, arrays in self._parts(work, in_order=True):  # so that equal scores rank alike in every process
            pairs = zip(*(torch.tensor(arrays[name]) for name in ("indices", "values")), strict=True)
            part = Extremes(*(Ranked(*side) for side in pairs))
            found = part if found is None else merged_extremes([found, part], k)
        assert found is not None  # a train set has examples
        return found

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
    def _sparse(self) -> bool:
        """Whether features are the largest entries of whitened gradients."""
        return self.estimator.trains[0].squares is not None

    def _stop(self) -> None:
        """Stop if the process was told to: called after each block of rows."""
        stop_if_asked(self.job.trainer)

    def _rows_of_a_chunk(self, enough: int = _ROWS, fewest: int = 1) -> int:
        """Return how many training examples' scores take a second; or ``enough``, unless these take over a minute."""
        product = _SPARSE if self._sparse else self.estimator.trains[0].shape[1]
        second = _PRODUCTS // (product * len(self.job.entries) * (self._m + 128))
        return max(1, second, min(enough, max(60 * second, fewest)))

    def _of_scores(self, what: str, names: Sequence[str], compute: Callable[[range], Parts], *, sample: bool) -> Work:
        """Return the work of matrices (n, m), and of the ``sample`` of a `Spread`."""

        def forms(rows: range) -> Forms:
            found = dict.fromkeys(names, ((len(rows), self._m), np.float32))
            sampled = len(self.job.entries), len(rows_of_sample(self._n, rows)), self._m
            return {**found, **({_SAMPLE: (sampled, np.float32)} if sample else {})}

        of_a_row = -(-_size(forms(range(self._n))) // self._n)
        most = _BYTES_ON_DISK if self._large else _BYTES_OF_SPARSE if self._sparse else _BYTES
        size = max(1, min(self._rows_of_a_chunk(), most // of_a_row))
        return Work(what, size, compute, forms, (_SAMPLE,) if sample else ())

    def _in_memory(self, work: Work) -> dict[str, Tensor]:
        """Return all rows of the matrices, and the sample."""
        names = set(work.forms(range(1))) - set(work.per_chunk)
        found, samples = {name: torch.empty(self._n, self._m) for name in names}, dict[int, Tensor]()
        for rows, arrays in self._parts(work):
            for name, matrix in found.items():
                matrix[rows.start : rows.stop] = torch.from_numpy(arrays[name])
            for name in work.per_chunk:
                samples[rows.start] = torch.tensor(arrays[name])
        return found | ({_SAMPLE: torch.cat([samples[start] for start in sorted(samples)], 1)} if samples else {})

    def _parts(self, work: Work, *, in_order: bool = False) -> Iterator[tuple[range, Parts]]:
        """Yield the arrays of each chunk. The store keeps them if it keeps the targets.

        Unless ``in_order``, those that this process computes come first, and are not read again.
        """
        chunks, yielded = self._chunks(work), set[int]()
        if self.targets.kept:
            try:
                for rows, arrays in self._fill(chunks, work):
                    if not in_order:
                        yielded.add(rows.start)
                        yield rows, arrays
            except OSError as error:  # a full disk, for example
                rank_zero_warn(f"Scores could not be stored and will be computed again: {error}")
            else:
                yield from ((rows, _read(chunks, rows, work)) for rows in chunks.all() if rows.start not in yielded)
                return
        left = [rows for rows in chunks.all() if rows.start not in yielded]
        with progress(self.job.trainer, "Scoring", len(left)) as advance:
            for rows in left:
                yield rows, work.compute(rows)
                advance(1)

    def _filled(self, work: Work) -> Chunks:
        """Return the chunks of all rows, which are in the store then."""
        chunks = self._chunks(work)
        for _ in self._fill(chunks, work):
            pass  # it is written
        return chunks

    def _chunks(self, work: Work) -> Chunks:
        return self.job.store.score_chunks(self.targets.digest, self._key(work), work.size, work.per_chunk)

    def _fill(self, chunks: Chunks, work: Work) -> Iterator[tuple[range, Parts]]:
        """Compute the chunks that are not in the store yet, together with other processes; yield the own ones."""
        missing = chunks.missing()
        if missing:
            chunks.folder.parent.mkdir(parents=True, exist_ok=True)
            check_space(self.job.store.dirpath, sum(_size(work.forms(rows)) for rows in missing))
            with progress(self.job.trainer, "Scoring", len(missing)) as advance:
                for claim, own in shares(chunks, partial(say_waiting, self.targets.reader)):
                    with in_background(claim.write_whole) as write_whole:
                        for rows in own:
                            arrays = work.compute(rows)
                            write_whole(rows.start, arrays)
                            yield rows, arrays
                            advance(1)

    def _key(self, work: Work) -> str:
        """Return all that the arrays depend on besides the targets."""
        estimator, entries = self.estimator, self.job.entries
        of = {
            "version": (_VERSION, SUMS_VERSION),
            "what": (work.what, *sorted(work.forms(range(1))), work.size, self._n),
            "features": [_identity(entry) for entry in entries],
            "terms": [checksums(train) for train in estimator.trains],
            "options": vars(estimator.options) | {"temperature": estimator.temperature},
            "weights": self.weights,
        }
        return json.dumps(of, sort_keys=True)


def _identity(entry: CheckpointEntry) -> tuple[Any, ...]:
    """Return what tells a checkpoint's features from others: from those in the store before it was added again, too.

    Those in an object store may be others if its files have changed. λ follows from the training time.
    """
    return entry.place, entry.created, entry.derived.name, entry.meta.get("training_time")


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
    sample = 4 * checkpoints * len(rows_of_sample(n, range(n))) * m
    return both + sample, both + sample


def _size(forms: Forms) -> int:
    """Return the bytes of some arrays."""
    return sum(prod(shape) * np.dtype(kind).itemsize for shape, kind in forms.values())


def _read(chunks: Chunks, rows: range, work: Work) -> Parts:
    """Return the arrays of a chunk; if it is damaged, they are computed again."""
    try:
        arrays = chunks.read(rows)
        if _fits(arrays, work.forms(rows)) and _are_rows(arrays.get("indices"), rows):
            return arrays
        why = "it has other arrays than were written"
    except Damaged as error:
        why = error.why
    except OSError as error:  # it may not be read, for example
        why = str(error)
    rank_zero_warn(f"'{chunks.path(rows.start)}' is damaged: {why}. It is computed again.")
    computed = dict(work.compute(rows))
    try:
        chunks.write(rows.start, computed)
    except OSError as error:
        rank_zero_warn(f"Scores could not be stored and will be computed again: {error}")
    return computed


def _fits(arrays: Parts, forms: Forms) -> bool:
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    return found == {name: (shape, np.dtype(kind)) for name, (shape, kind) in forms.items()}


def _are_rows(indices: Array | None, rows: range) -> bool:
    return indices is None or not indices.size or bool(rows.start <= indices.min() <= indices.max() < rows.stop)
