"""What an attribution will take: time, disk and memory of each stage, from one measured batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch

from lightning_trak.curvature import Whitening
from lightning_trak.features.largest import largest_entries, matrix_of
from lightning_trak.influence import score_products
from lightning_trak.results.terminal import size_text, table
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.files import free_space
from lightning_trak.store.known import digest_of_set
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import Weights, read_weights, weights_digest
from lightning_trak.trainer.attributing.ckpt_path import CkptPath, files_of, of_store
from lightning_trak.trainer.attributing.job import ready
from lightning_trak.trainer.attributing.scoring import bytes_of_scores
from lightning_trak.trainer.attributing.target_features import target_chunks
from lightning_trak.trainer.featurizing.curvature import FEW, trial_curvature, trial_whitening
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop, Measured
from lightning_trak.trainer.featurizing.opening import open_store
from lightning_trak.trainer.featurizing.plan import Plan
from lightning_trak.trainer.featurizing.preflight import preflight
from lightning_trak.trainer.host.framework import Trainer
from lightning_trak.trainer.host.reports import time_text

_ROWS, _TARGETS = 256, 64  # of the product that is measured


@dataclass(frozen=True)
class Stage:
    """What a stage takes.

    Attributes:
        name: what is done.
        seconds: the time.
        disk: the bytes that are added to the store.
        memory: the bytes in memory at the same time, besides model and data.
    """

    name: str
    seconds: float = 0.0
    disk: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Forecast:
    """What an attribution will take; ``print`` shows it as a table.

    Attributes:
        stages: in order.
        free: the bytes that are free on the store's disk.

    >>> print(Forecast([Stage("targets", 90.0, 2_000_000, 10_000_000)], free=10**9))
    stage     time       disk     memory
    targets   1.5 min    2 MB     10 MB
    together  1.5 min    2 MB     10 MB   (1 GB free)
    """

    stages: Sequence[Stage]
    free: int

    @property
    def seconds(self) -> float:
        """The time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk(self) -> int:
        """The bytes that are added to the store."""
        return sum(stage.disk for stage in self.stages)

    @property
    def problem(self) -> str:
        """Say what would fail; an empty text if nothing is known to."""
        if self.disk <= self.free:
            return ""
        needed = f"{size_text(self.disk)} are needed on the disk of the store, and {size_text(self.free)} are free"
        return f"{needed}. Free space, or give TRAKCallback a dirpath on another disk, or a smaller proj_dim."

    def __str__(self) -> str:
        rows = [("stage", "time", "disk", "memory")]
        rows += [(one.name, time_text(one.seconds), size_text(one.disk), size_text(one.memory)) for one in self.stages]
        most = max((stage.memory for stage in self.stages), default=0)
        rows.append(("together", time_text(self.seconds), size_text(self.disk), size_text(most)))
        text = f"{table(rows)}   ({size_text(self.free)} free)"
        return "\n".join(filter(None, [text, self.problem and f"It would fail: {self.problem}"]))


class Pending(NamedTuple):
    """A checkpoint that is to be attributed.

    Attributes:
        digest: of its weights.
        weights: reads them.
        entry: in the store; None if it is not there yet.
    """

    digest: str
    weights: Callable[[], Weights]
    entry: CheckpointEntry | None


def forecast(trainer: Trainer, model: Any, dataloaders: Any, datamodule: Any, ckpt_path: CkptPath) -> Forecast:
    """Measure a batch of train set and targets; return what ``trainer.attribute`` will take. Nothing is written."""
    with ready(trainer, model, dataloaders, datamodule, ckpt_path) as (callback, module, _, loaders):
        path, files = callback.store_path(trainer), files_of(trainer, ckpt_path)
        settings, reports, store = callback.settings, callback.reports, None
        if files is not None and not (path / "manifest.json").exists():
            plan = Plan.choose(settings, reports, trainer, module, loaders.train())
        else:
            store, plan = open_store(path, settings, reports, trainer, module, loaders, may_grow=False)
        if files is not None:
            pending = _of_files(store, files)
        else:
            entries = [] if store is None else store.entries(of_store(trainer, store, ckpt_path, callback.last_saved))
            pending = [Pending(entry.digest, entry.weights, entry) for entry in entries]
        weights, digest = pending[0].weights(), pending[0].digest
        train = plan.loop(trainer, module, loaders.train(), loaders.train, "train")
        targets = plan.loop(trainer, module, loaders.targets(), loaders.train, "target")
        targets.reader.label_targets(pending[-1].weights)
        for loop in (train, targets):
            preflight(loop, pending[0].weights(), digest)
        curvature, whitening = _curvature(train, weights, digest, pending)
        of_train, of_targets = (loop.measured(pending[0].weights(), digest, whitening) for loop in (train, targets))
        there, count = [one.entry for one in pending if one.entry is not None], len(pending)
        rows = train.reader.size * count - sum(len(rows) for entry in there for rows in entry.train.present())
        stages = [
            *curvature,
            _featurizing("train set", train, of_train, rows, count),
            _featurizing("targets", targets, of_targets, _missing_targets(targets, pending), count),
            *_scoring(train, of_train, of_targets, targets.reader.size, count, callback.memory_limit),
        ]
        size = sum(value.nbytes for value in weights.values())
        stages.insert(0, Stage("weights", disk=(count - len(there)) * size))
    return Forecast([stage for stage in stages if stage != Stage(stage.name)], free_space(path))


def _of_files(store: FeatureStore | None, files: Sequence[str | os.PathLike[str]]) -> list[Pending]:
    """Return the checkpoints in some files; those that are in the store keep their features."""
    found = {weights_digest(read_weights(path)): path for path in files}
    there = {} if store is None else {entry.digest: entry for entry in store.entries(found)}
    loads: dict[str, Callable[[], Weights]] = {digest: partial(read_weights, path) for digest, path in found.items()}
    loads |= {digest: entry.weights for digest, entry in there.items()}
    return [Pending(digest, load, there.get(digest)) for digest, load in loads.items()]


def _curvature(
    loop: FeaturizationLoop, weights: Weights, digest: str, pending: Sequence[Pending]
) -> tuple[list[Stage], Whitening | None]:
    """Return what the curvature takes at the checkpoints that lack it, and one of a few examples to measure with."""
    own = loop.preconditioner
    if own is None:
        return [], None
    start = perf_counter()
    curvature = trial_curvature(loop, own, weights, digest)
    few = perf_counter() - start
    start = perf_counter()
    trial_curvature(loop, own, weights, digest, examples=2 * FEW)
    each = max(0.0, perf_counter() - start - few) / FEW
    examples = sum(min(loop.reader.size, size) for size in (own.basis_examples, own.examples))
    count = sum(one.entry is None or not one.entry.whitening_notes for one in pending)
    size = sum(value.nbytes for value in curvature.tensors().values())
    stage = Stage("curvature", count * (few + each * max(0, examples - 2 * FEW)), count * size, 2 * size)
    return [stage] * (count > 0), trial_whitening(loop, own, curvature)


def _featurizing(name: str, loop: FeaturizationLoop, measured: Measured, rows: int, checkpoints: int) -> Stage:
    """Return what it takes to featurize some rows; the features of targets are in memory at all checkpoints."""
    row = loop.form.row_bytes
    kept = row * loop.reader.size * checkpoints if loop.reader.examples == "target" else 0
    return Stage(name, rows * measured.seconds, rows * row, measured.memory + kept if rows else kept)


def _missing_targets(loop: FeaturizationLoop, pending: Sequence[Pending]) -> int:
    """Return how many targets are to be featurized, at all checkpoints together."""
    digests = loop.reader.digests(pending[0].weights())
    if digests is None:
        return loop.reader.size * len(pending)
    own, known = digest_of_set(digests), [one.entry for one in pending if one.entry is not None]
    there = sum(len(rows) for entry in known for rows in target_chunks(loop, entry, own).present())
    return loop.reader.size * len(pending) - there


def _scoring(
    loop: FeaturizationLoop, train: Measured, targets: Measured, m: int, checkpoints: int, limit: float
) -> list[Stage]:
    """Return what H and scores take, from products of the measured features."""
    n, k = loop.reader.size, loop.dimension
    disk, memory = bytes_of_scores(n, m, checkpoints, limit)
    if loop.preconditioner is not None:
        rows, vectors = (matrix_of(largest_entries(one.features, loop.form.entries or k)) for one in (train, targets))
        seconds = _seconds_of_product(rows, vectors, loop.reader.device)
        return [Stage("scores", n * m * checkpoints * seconds, disk, memory)]
    each = _seconds_of_product(torch.randn(_ROWS, k), torch.randn(_TARGETS, k), loop.reader.device)
    products = n * k / 2 + k * k / 3 + m * k  # of vectors of k numbers: H is symmetric
    triangle = 4 * k * (k + 1)  # of H, float64; the store keeps no more
    return [
        Stage("H and its solutions", checkpoints * products * each, checkpoints * triangle, 6 * triangle),
        Stage("scores", n * m * checkpoints * each, disk, memory),
    ]


def _seconds_of_product(rows: Any, vectors: Any, device: torch.device) -> float:
    """Return the time of one product of a row with a vector."""
    ones = torch.ones(rows.shape[0])
    score_products(rows, ones, vectors, device)
    start = perf_counter()
    score_products(rows, ones, vectors, device).cpu()
    return (perf_counter() - start) / (len(rows) * len(vectors))
