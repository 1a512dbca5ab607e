"""Targets: their features at every checkpoint, which the store keeps for later calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from lightning_trak.features.largest import Array, matrix_of
from lightning_trak.features.sparse_matrix import SparseMatrix
from lightning_trak.features.stored import dense
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.chunks import Chunks, rows_in_a_chunk, scattered
from lightning_trak.store.known import KnownRows, OtherSets, digest_of_set, write_examples
from lightning_trak.tasks.checks import rows_text
from lightning_trak.trainer.attributing.job import Job
from lightning_trak.trainer.featurizing.checkpoints import check_some, fill, naming
from lightning_trak.trainer.featurizing.curvature import whitening_at
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop
from lightning_trak.trainer.featurizing.reading import ExampleReader
from lightning_trak.trainer.host.framework import rank_zero_warn

_SHARED = 16  # chunks, which several processes share, at least


class TargetFeatures(NamedTuple):
    """What is known of the targets.

    Attributes:
        features: φ(z), (m, k), at every checkpoint; sparse if whitened.
        outputs: f(z), (m,), see `Attribution.outputs`.
        digest: of the targets' content; of no use later if they are random.
        kept: whether the store keeps them for later calls: they are not random, and it can be written.
        reader: reads them.
    """

    features: list[Tensor | SparseMatrix]
    outputs: Tensor
    digest: str
    kept: bool
    reader: ExampleReader


def target_features(job: Job) -> TargetFeatures:
    """Return the features of all targets at every checkpoint."""
    loop, total, strategy = job.target_loop(), len(job.entries), job.trainer.strategy
    digests = loop.reader.digests(job.entries[0].weights())
    kept_as = strategy.broadcast(uuid4().hex) if digests is None else digest_of_set(digests)
    check_some(loop, [(entry, target_chunks(loop, entry, kept_as)) for entry in job.entries])
    known = _known_targets(job, loop, digests)
    features, latest = [], {}
    for number, (entry, scales) in enumerate(zip(job.entries, job.scales, strict=True), 1):
        found, outputs = _featurize_targets(loop, entry, f"{number}/{total}", kept_as, known)
        features.append(found.scaled(scales) if isinstance(found, SparseMatrix) else found)
        latest[entry.meta.get("run") or entry.digest] = outputs
    if digests is None:  # random targets, or such as cannot be compared: of no use later
        strategy.barrier()
        shutil.rmtree(job.store.targets_folder(kept_as), ignore_errors=True)
    kept = digests is not None and all(target_chunks(loop, entry, kept_as).complete for entry in job.entries)
    return TargetFeatures(features, torch.stack(list(latest.values())).mean(0), kept_as, kept, loop.reader)


def _known_targets(
    job: Job, loop: FeaturizationLoop, digests: Sequence[bytes] | None
) -> Callable[[CheckpointEntry], KnownRows]:
    """Return a function, checkpoint → targets that are stored in other sets; note this set for others."""
    if digests is None:
        return lambda _: KnownRows({})
    with suppress(OSError):  # a full disk, or a read-only store: `_featurize_targets` says so
        write_examples(job.store, digests)
    return OtherSets(job.store, digests, partial(target_chunks, loop)).known


def target_chunks(loop: FeaturizationLoop, entry: CheckpointEntry, digest: str, m: int | None = None) -> Chunks:
    """Return the chunks of m targets, by default of those that the loop reads; enough that processes share the work."""
    m = loop.reader.size if m is None else m
    return entry.targets(digest, m, min(max(1, m // _SHARED), rows_in_a_chunk(loop.form.row_bytes, m)))


def _featurize_targets(
    loop: FeaturizationLoop,
    entry: CheckpointEntry,
    number: str,
    digest: str,
    known: Callable[[CheckpointEntry], KnownRows],
) -> tuple[Tensor | SparseMatrix, Tensor]:
    """Return the features of the targets at a checkpoint; the store keeps them, and processes share the work.

    Returns:
        φ(z), (m, k), of whitened gradients the largest entries; and f(z), (m,).
    """
    chunks = target_chunks(loop, entry, digest)
    description = f"Featurizing targets at checkpoint {number}"
    if not chunks.complete:
        weights = entry.weights()
        with naming(entry, can_leave_out=False):  # the cause is in the targets
            whitening = whitening_at(loop, entry, weights)
            try:
                chunks.folder.parent.mkdir(parents=True, exist_ok=True)
                fill(loop, entry, chunks, weights, description, whitening, known(entry))
            except OSError as error:  # a full disk, or a read-only store
                rank_zero_warn(f"Features of targets could not be stored and will be computed again: {error}")
                parts: list[tuple[Sequence[int], dict[str, Array]]] = []
                rows, receive = range(loop.reader.size), lambda *part: parts.append(part)
                loop.run(weights, entry.digest, rows, receive, description, whitening)
                return _of_targets(loop, scattered(parts, len(rows)))
    (found,) = chunks.blocks(None, loop.reader.size)
    return _of_targets(loop, found)


def _of_targets(loop: FeaturizationLoop, found: dict[str, Array]) -> tuple[Tensor | SparseMatrix, Tensor]:
    """Return features and outputs of targets from arrays by name; warn of zero gradients."""
    numbers = found["features" if "features" in found else "values"]
    _warn_of_zero_gradients(loop.reader, np.flatnonzero(~np.any(numbers, 1)).tolist())
    features = dense(found) if "features" in found else matrix_of(found)
    return features, torch.from_numpy(found["outputs"])


def _warn_of_zero_gradients(reader: ExampleReader, rows: Sequence[int]) -> None:
    """Warn of targets with a zero gradient; with only some parameters attributed, a dead unit may be the cause."""
    if not rows:
        return
    what = (
        f"The gradient of {type(reader.module).__name__}.model_output is zero for {len(rows)} targets (rows"
        f" {rows_text(rows)}), so all of their scores are zero too. If an output_mask or ignore_index leaves out all of"
        " their parts, fix or remove these targets."
    )
    trained = {name for name, value in reader.module.named_parameters() if value.requires_grad}
    tell = reader.reports.warn if trained <= set(reader.parameters) else reader.reports.tell
    tell(what, about=what)
