"""The steps at one checkpoint of the store: add it, featurize train set and targets, check stored features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_trak.curvature import Whitening
from lightning_trak.data.identity import sampled_rows
from lightning_trak.features.largest import ENTRIES, SparseRows, matrix_of
from lightning_trak.features.loss_projection import LossProjection
from lightning_trak.features.sparse_matrix import SparseMatrix
from lightning_trak.features.stored import dense
from lightning_trak.influence import SUMS_VERSION, Estimator, GaussNewton, TrainFeatures, TrainingTime, is_logistic
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.chunks import Chunks, Claim, Reader, scattered, shares, wait_a_moment
from lightning_trak.store.files import Damaged, check_space
from lightning_trak.store.known import KnownRows, known_of_train
from lightning_trak.store.store import FeatureStore, rows_in_a_chunk
from lightning_trak.store.weights import Weights, load_weights
from lightning_trak.trainer.featurization import FeatureBlock, FeaturizationLoop
from lightning_trak.trainer.framework import rank_zero_warn, stop_if_asked
from lightning_trak.trainer.reading import ExampleReader
from lightning_trak.trainer.reports import Reports
from lightning_trak.trainer.whitening import same, same_features, whitening_at

Array = npt.NDArray[Any]
T = TypeVar("T")
_CHECKED = 8  # stored rows that are computed again
_MENDED = 3  # how often damaged features are computed again before that is given up
_SHOWN = 10  # examples named in a warning, at most
_SHARED = 16  # chunks of targets, which several processes share, at least


def pool_of(store: FeatureStore, entries: Sequence[CheckpointEntry] | None = None) -> str:
    """Say how many checkpoints of the store are averaged over (by default all), and from how many runs."""
    chosen = list(store) if entries is None else entries
    runs = {entry.meta.get("run") for entry in chosen}
    known = len(runs - {None})
    sources = [f"{known} run{'s' * (known > 1)}"] * (known > 0) + ["files"] * (None in runs)
    return f"{len(chosen)} of {len(store)} checkpoints in '{store.dirpath}', from {' and '.join(sources)}"


@contextmanager
def naming(entry: CheckpointEntry, *, can_leave_out: bool = True) -> Iterator[None]:
    """Add to a ValueError at which checkpoint it was raised and, if that helps, how to leave the checkpoint out."""
    try:
        yield
    except Damaged:
        raise  # it names the file
    except ValueError as error:
        remedy = f" To leave this checkpoint out, delete '{entry.path}'." if can_leave_out else ""
        raise ValueError(
            f"At checkpoint {entry.digest} (file '{entry.meta.get('file')}', step {entry.meta.get('global_step')}):"
            f" {str(error).rstrip('.')}.{remedy}"
        ) from error


def mended(entries: Sequence[CheckpointEntry], compute: Callable[[], T]) -> T:
    """Call ``compute``, which featurizes what is missing and reads it, until no stored features are damaged.

    Damaged features are deleted, so that they are missing. It is also called again if a checkpoint was deleted.
    """
    for _ in range(_MENDED):
        try:
            return compute()
        except Damaged as error:
            if not all(entry.path.is_dir() for entry in entries):
                continue
            if not any(entry.computes(error.path) for entry in entries):
                raise
            deleted = [path for entry in entries for path in entry.delete_damaged(error.path)]
            rank_zero_warn(f"'{error.path}' is damaged: {error.why}. {max(1, len(deleted))} files are computed again.")
    return compute()


def featurize_checkpoint(loop: FeaturizationLoop, entry: CheckpointEntry, number: str) -> Mapping[str, float]:
    """Compute the train features of a checkpoint that are missing. Several processes may do so: they share the work.

    Returns:
        How many seconds each stage took; empty if nothing was missing.
    """
    return mended([entry], partial(_featurize_checkpoint, loop, entry, number))


def _featurize_checkpoint(loop: FeaturizationLoop, entry: CheckpointEntry, number: str) -> Mapping[str, float]:
    missing = sum(map(len, entry.train.missing()))
    if not missing:
        entry.forget_former()
        return {}
    if missing < entry.n_train and loop.reader.repeatable:
        check_features(loop, entry, entry.train, entry.train.present())
    weights = load_weights(entry.weights_path, entry.digest)
    check_space(entry.path, missing * loop.form.row_bytes)
    meta = entry.meta
    where = f" (epoch {meta.get('epoch')}, step {meta.get('global_step')})" if "epoch" in meta else ""
    with naming(entry):
        entry.supplement({"logistic": not loop.loss_terms.need_projection, "n_trainable": loop.reader.n_trainable})
        began = perf_counter()
        whitening = whitening_at(loop, entry, weights, f"Curvature of checkpoint {number}{where}")
        known, description = known_of_train(entry), f"Featurizing checkpoint {number}{where}"
        whitened = perf_counter()
        projection = _fill(loop, entry, entry.train, weights, description, whitening, known)
        seconds = {"featurizing_seconds": perf_counter() - whitened}
        seconds |= {} if whitening is None else {"curvature_seconds": whitened - began}
    entry.forget_former()
    if projection is not None:
        if projection.seen == loop.reader.size:  # else it knows a part of the rows
            entry.supplement({"loss_explained": projection.explained()})
        _report(loop.reader.reports, projection)
    return seconds


def _fill(
    loop: FeaturizationLoop,
    entry: CheckpointEntry,
    chunks: Chunks,
    weights: Weights,
    description: str,
    whitening: Whitening | None,
    known: KnownRows,
) -> LossProjection | None:
    """Compute missing chunks until none is missing; return the projection that gave Q in this process, if one did.

    Rows that are stored elsewhere are copied. These, and chunks that other processes compute at the same time, are
    checked as those that are there: they may have another ``model_output``.
    """
    projection, mine = None, {rows.start for rows in chunks.present()}
    for claim, own in shares(chunks, partial(_wait, loop.reader)):

        def receive(batch_rows: Sequence[int], block: FeatureBlock, claim: Claim = claim) -> None:
            mine.update(batch_rows)
            claim.write(batch_rows, loop.form.arrays(block.features) | _numbers(block))

        rows, total = _unknown(claim, own, known), sum(map(len, chunks.missing()))
        found = loop.run(weights, entry.digest, rows, receive, description, whitening, total)
        projection = projection or found
    others = [rows for rows in chunks.present() if rows.start not in mine]
    if others and loop.reader.repeatable:
        check_features(loop, entry, chunks, others)
    return projection


def _wait(reader: ExampleReader) -> None:
    """Wait a moment for other processes, unless this one was told to stop."""
    reader.reports.tell_once("other processes compute what is missing; waiting for them.")
    stop_if_asked(reader.trainer)
    wait_a_moment()


def _report(reports: Reports, projection: LossProjection) -> None:
    """Report how Q was found by projection, at the first checkpoint; warn once of each kind of doubt."""
    reports.tell(f"{projection}.", about="projection")
    for kind, doubt in projection.doubts().items():
        reports.warn(doubt, about=kind)


def _unknown(claim: Claim, own: Iterable[range], known: KnownRows) -> Iterator[int]:
    """Copy the known rows of claimed chunks; yield the others."""
    for rows in own:
        copied: set[int] = set()
        for found, arrays in known.among(rows):
            claim.write(found, arrays)
            copied.update(found)
        yield from (row for row in rows if row not in copied)


def _numbers(block: FeatureBlock) -> dict[str, Array]:
    """Return what is stored of a block besides its features."""
    return {"loss_grad": block.loss_grad, "curvature": block.curvature, "outputs": block.outputs}


def check_features(loop: FeaturizationLoop, entry: CheckpointEntry, chunks: Chunks, stored: Sequence[range]) -> None:
    """Compute a few stored rows again: ``model_output`` or the data may have changed, which the store cannot know.

    Args:
        loop: reads the examples.
        entry: the checkpoint.
        chunks: what is stored of the examples.
        stored: the rows of some that are there.

    Raises:
        ValueError: if they differ from the stored rows.
    """
    there = [row for rows in stored for row in rows]
    rows = [there[place] for place in sampled_rows(len(there), _CHECKED)]

    def compare(batch_rows: Sequence[int], block: FeatureBlock) -> None:
        former = chunks.rows(batch_rows)
        equal = {"features": same_features(loop.form.arrays(block.features), former)}
        equal |= {name: same(numbers, former[name]) for name, numbers in _numbers(block).items()}
        for name, is_equal in equal.items():
            if not is_equal:
                raise ValueError(
                    f"The stored {name} of {loop.reader.examples} rows {batch_rows} are not those that the model and"
                    " the data give now: model_output, the loss, the collate function or a batch hook has changed"
                    " since. Restore it, or use another dirpath for TRAKCallback."
                )

    with naming(entry, can_leave_out=False):  # the cause affects all checkpoints
        weights = load_weights(entry.weights_path, entry.digest)
        whitening = whitening_at(loop, entry, weights)
        loop.run(weights, entry.digest, rows, compare, "Checking the store", whitening)


def check_some(loop: FeaturizationLoop, stored: Sequence[tuple[CheckpointEntry, Chunks]]) -> None:
    """Check stored features at the first and the last checkpoint that has some; random examples cannot be compared."""
    there = [(entry, chunks) for entry, chunks in stored if chunks.present()] if loop.reader.repeatable else []
    for entry, chunks in dict.fromkeys([*there[:1], *there[-1:]]):
        check_features(loop, entry, chunks, chunks.present())


def target_chunks(loop: FeaturizationLoop, entry: CheckpointEntry, digest: str, m: int | None = None) -> Chunks:
    """Return the chunks with the features of targets; their number lets several processes share the work.

    Args:
        loop: reads the targets.
        entry: the checkpoint.
        digest: of the targets.
        m: their number; by default, of those that the loop reads.
    """
    m = loop.reader.size if m is None else m
    return entry.targets(digest, m, min(max(1, m // _SHARED), rows_in_a_chunk(loop.form.row_bytes)))


class StoredFeatures:
    """Φ of a checkpoint, (n, k), of which parts are read from its chunks."""

    def __init__(self, chunks: Chunks) -> None:
        first = chunks.read(chunks.all()[0])
        self.shape = (chunks.n, first["features"].shape[1])
        self._read = Reader(chunks, [name for name in ("features", "scale") if name in first])

    def __getitem__(self, rows: slice) -> Tensor:
        """Return some rows."""
        return dense(self._read(range(*rows.indices(self.shape[0]))))


def train_features(
    entry: CheckpointEntry, dimension: int | None, *, rest: bool = False, scales: Tensor | None = None
) -> TrainFeatures:
    """Return the train set's features at a complete checkpoint; Φ is verified whenever it is read.

    Args:
        entry: the checkpoint.
        dimension: p, if they are whitened: then each has its largest entries alone.
        rest: whether they are whitened by what the outputs leave open.
        scales: to multiply their entries with, (p,); None for 1.
    """
    train, training = entry.train, entry.meta.get("training_time")
    terms = ["outputs", "loss_grad", "curvature"]
    small = train.columns(terms if dimension is None else [*terms, "squares"])
    logistic = entry.meta.get("logistic", False)
    return TrainFeatures(
        StoredFeatures(train)
        if dimension is None
        else SparseRows(Reader(train, ENTRIES), (train.n, dimension), scales),
        small["loss_grad"],
        small["curvature"],
        training_time=None if training is None else TrainingTime(**training),
        logistic=logistic and is_logistic(*(torch.from_numpy(small[name]) for name in terms)),
        n_trainable=entry.meta.get("n_trainable") or 0,
        squares=small.get("squares"),
        whitened_by_rest=rest,
    )


def sums_of(entry: CheckpointEntry, estimator: Estimator, train: TrainFeatures) -> GaussNewton | None:
    """Return the estimator's sums over the train set at a checkpoint; the store caches them.

    None for whitened features, which need none.
    """
    if train.squares is not None:
        return None
    options = estimator.options
    key: dict[str, Any] = {"version": SUMS_VERSION, "estimator": options.estimator, "curvature": options.curvature}
    key["temperature"] = estimator.temperature
    key["of"] = [crc32(np.ascontiguousarray(numbers).data) for numbers in (train.loss_grad, train.curvature)]
    kept = entry.read_sums(key)
    sums = None if kept is None else GaussNewton.from_arrays(kept, estimator.device)
    if sums is None or not estimator.suffices(train, sums):
        sums = estimator.accumulate(train)
        try:
            entry.write_sums(key, sums.arrays())
        except OSError as error:  # a full disk, or a read-only store
            rank_zero_warn(f"Sums over the train set could not be stored and will be computed again: {error}")
    return sums


def featurize_targets(
    loop: FeaturizationLoop,
    entry: CheckpointEntry,
    number: str,
    digest: str,
    known: Callable[[CheckpointEntry], KnownRows],
) -> tuple[Tensor | SparseMatrix, Tensor]:
    """Return the features of the targets at a checkpoint; the store keeps them, and processes share the work.

    Args:
        loop: reads the targets.
        entry: the checkpoint.
        number: of the checkpoint, for the progress bar.
        digest: of the targets.
        known: returns those that are stored in other sets, at a checkpoint.

    Returns:
        φ(z), (m, k), of whitened gradients the largest entries; and f(z), (m,).
    """
    chunks = target_chunks(loop, entry, digest)
    description = f"Featurizing targets at checkpoint {number}"
    if not chunks.complete:
        weights = load_weights(entry.weights_path, entry.digest)
        with naming(entry, can_leave_out=False):  # the cause is in the targets
            whitening = whitening_at(loop, entry, weights)
            try:
                chunks.folder.parent.mkdir(parents=True, exist_ok=True)
                _fill(loop, entry, chunks, weights, description, whitening, known(entry))
            except OSError as error:  # a full disk, or a read-only store
                rank_zero_warn(f"Features of targets could not be stored and will be computed again: {error}")
                return _of_targets(loop, _collected(loop, weights, entry.digest, description, whitening))
    (found,) = chunks.blocks(None, loop.reader.size)
    return _of_targets(loop, found)


def _collected(
    loop: FeaturizationLoop, weights: Weights, digest: str, description: str, whitening: Whitening | None
) -> dict[str, Array]:
    """Return features and outputs of all examples, by name."""
    parts: list[tuple[Sequence[int], dict[str, Array]]] = []

    def receive(rows: Sequence[int], block: FeatureBlock) -> None:
        parts.append((rows, loop.form.arrays(block.features) | {"outputs": block.outputs}))

    loop.run(weights, digest, range(loop.reader.size), receive, description, whitening)
    return scattered(parts, loop.reader.size)


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
    shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
    what = (
        f"The gradient of {type(reader.module).__name__}.model_output is zero for {len(rows)} targets (rows"
        f" {shown}), so all of their scores are zero too. If an output_mask or ignore_index leaves out all of"
        " their parts, fix or remove these targets."
    )
    trained = {name for name, value in reader.module.named_parameters() if value.requires_grad}
    tell = reader.reports.warn if trained <= set(reader.parameters) else reader.reports.tell
    tell(what, about=what)
