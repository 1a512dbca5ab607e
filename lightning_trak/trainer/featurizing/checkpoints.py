"""The steps at one checkpoint of the store: featurize what is missing, check and mend what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import TypeVar

import numpy as np

from lightning_trak.curvature import Whitening
from lightning_trak.data.identity import sampled_rows
from lightning_trak.features.largest import Array, difference
from lightning_trak.features.loss_projection import LossProjection
from lightning_trak.features.stored import dense
from lightning_trak.store.background import in_background
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.chunks import Chunks, shares
from lightning_trak.store.files import Damaged, check_space
from lightning_trak.store.known import KnownRows, known_of_train
from lightning_trak.store.weights import Weights
from lightning_trak.trainer.featurizing.curvature import whitening_at
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop
from lightning_trak.trainer.featurizing.reading import ExampleReader
from lightning_trak.trainer.host.framework import rank_zero_warn, stop_if_asked

T = TypeVar("T")
Write = Callable[[Sequence[int], Mapping[str, Array]], object]  # takes rows, and arrays by name
_CHECKED = 8  # stored rows that are computed again
_MENDED = 3  # how often damaged features are computed again before that is given up


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
    weights = entry.weights()
    check_space(entry.path, missing * loop.form.row_bytes)
    meta = entry.meta
    where = f" (epoch {meta.get('epoch')}, step {meta.get('global_step')})" if "epoch" in meta else ""
    with naming(entry):
        entry.supplement({"logistic": not loop.loss_terms.need_projection, "n_trainable": loop.reader.n_trainable})
        began = perf_counter()
        whitening = whitening_at(loop, entry, weights, f"Curvature of checkpoint {number}{where}")
        known, description = known_of_train(entry), f"Featurizing checkpoint {number}{where}"
        whitened = perf_counter()
        projection = fill(loop, entry, entry.train, weights, description, whitening, known)
        seconds = {"featurizing_seconds": perf_counter() - whitened}
        seconds |= {} if whitening is None else {"curvature_seconds": whitened - began}
    entry.forget_former()
    if projection is not None:
        if projection.seen == loop.reader.size:  # else it knows a part of the rows
            entry.supplement({"loss_explained": projection.explained()})
        loop.reader.reports.tell(f"{projection}.", about="projection")  # of the first checkpoint
        for kind, doubt in projection.doubts().items():
            loop.reader.reports.warn(doubt, about=kind)
    return seconds


def fill(
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
    for claim, own in shares(chunks, partial(say_waiting, loop.reader)):
        total = sum(map(len, chunks.missing()))
        with in_background(claim.write) as write:

            def receive(batch_rows: Sequence[int], arrays: dict[str, Array], write: Write = write) -> None:
                mine.update(batch_rows)
                write(batch_rows, arrays)

            rows = _unknown(write, own, known)
            found = loop.run(weights, entry.digest, rows, receive, description, whitening, total)
        projection = projection or found
    others = [rows for rows in chunks.present() if rows.start not in mine]
    if others and loop.reader.repeatable:
        check_features(loop, entry, chunks, others)
    return projection


def say_waiting(reader: ExampleReader) -> None:
    """Say that this process waits for others, unless it was told to stop."""
    reader.reports.tell_once("other processes compute what is missing; waiting for them.")
    stop_if_asked(reader.trainer)


def _unknown(write: Write, own: Iterable[range], known: KnownRows) -> Iterator[int]:
    """Copy the known rows of claimed chunks; yield the others."""
    for rows in own:
        copied: set[int] = set()
        for found, arrays in known.among(rows):
            write(found, arrays)
            copied.update(found)
        yield from (row for row in rows if row not in copied)


def check_features(loop: FeaturizationLoop, entry: CheckpointEntry, chunks: Chunks, stored: Sequence[range]) -> None:
    """Compute a few stored rows again: ``model_output`` or the data may have changed, which the store cannot know.

    ``stored`` are the rows of some chunks that are there.

    Raises:
        ValueError: if they differ from the stored rows.
    """
    there = [row for rows in stored for row in rows]
    rows = [there[place] for place in sampled_rows(len(there), _CHECKED)]

    def compare(batch_rows: Sequence[int], arrays: dict[str, Array]) -> None:
        former = chunks.rows(batch_rows)
        equal = {"features": _same_features(arrays, former)}
        equal |= {name: _same(arrays[name], former[name]) for name in ("loss_grad", "curvature", "outputs")}
        for name, is_equal in equal.items():
            if not is_equal:
                raise ValueError(
                    f"The stored {name} of {loop.reader.examples} rows {batch_rows} are not those that the model and"
                    " the data give now: model_output, the loss, the collate function or a batch hook has changed"
                    " since. Restore it, or use another dirpath for TRAKCallback."
                )

    with naming(entry, can_leave_out=False):  # the cause affects all checkpoints
        weights = entry.weights()
        whitening = whitening_at(loop, entry, weights)
        loop.run(weights, entry.digest, rows, compare, "Checking the store", whitening)


def _same_features(new: Mapping[str, Array], stored: Mapping[str, Array]) -> bool:
    """Say whether features are the same up to rounding."""
    return difference(new, stored) <= 0.05 if "indices" in new else _same(dense(new).numpy(), dense(stored).numpy())


def _same(new: Array, stored: Array) -> bool:
    """Say whether two arrays are the same up to rounding."""
    return not np.linalg.norm(new - stored) > 0.05 * np.linalg.norm(stored) + 1e-4  # damage by NaN is told later


def check_some(loop: FeaturizationLoop, stored: Sequence[tuple[CheckpointEntry, Chunks]]) -> None:
    """Check stored features at the first and the last checkpoint that has some; random examples cannot be compared."""
    there = [(entry, chunks) for entry, chunks in stored if chunks.present()] if loop.reader.repeatable else []
    for entry, chunks in dict.fromkeys([*there[:1], *there[-1:]]):
        check_features(loop, entry, chunks, chunks.present())
