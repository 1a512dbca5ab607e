"""What the loggers of a Trainer are told during ``fit``: times, progress, and what stands out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lightning_trak.data.annotations import annotations_of
from lightning_trak.results.numbers import number_text
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.trainer.host.framework import Trainer
from lightning_trak.trainer.host.reports import Reports

_ROWS = 20  # of the table
_TABLE = "trak/largest_loss_gradients"

Row = list[str | int | float]


def log_numbers(trainer: Trainer, reports: Reports, numbers: Mapping[str, float]) -> None:
    """Log numbers under ``trak/<name>``, at the present training step; if a logger fails, that is a warning."""
    named = {f"trak/{name}": float(number) for name, number in numbers.items()}
    _to_each(trainer, reports, lambda logger: logger.log_metrics(named, step=_step(trainer)))


def log_largest(trainer: Trainer, reports: Reports, entries: Sequence[CheckpointEntry], dataset: Any) -> None:
    """Log a table of the training examples with the largest |Q|, averaged over checkpoints, where a logger takes one.

    They cost nothing, for Q is stored. ``trainer.suspects()`` ranks with more, and says what is wrong.
    """
    if not trainer.loggers or not trainer.is_global_zero:
        return
    total = torch.zeros(entries[0].n_train)
    for entry in entries:
        total += torch.from_numpy(entry.train.column("loss_grad")).float().abs()
    found = (total / len(entries)).topk(min(_ROWS, len(total)))
    titles, rows = _table(found.indices.tolist(), found.values.tolist(), dataset)
    _to_each(trainer, reports, lambda logger: _log_table(logger, titles, rows, _step(trainer)))


def _to_each(trainer: Trainer, reports: Reports, log: Callable[[Any], object]) -> None:
    """Let each logger log; one that fails is a warning, since training goes on."""
    for logger in trainer.loggers:
        try:
            log(logger)
        except Exception as error:  # for example without a network
            kind, why = type(logger).__name__, f"{type(error).__name__}: {str(error).rstrip('.')}"
            reports.warn(f"TRAKCallback could not log to {kind}: {why}. Training goes on.", about=f"the logger {kind}")


def _step(trainer: Trainer) -> int:
    """Return the step under which Lightning logs now; with several optimizers it is not ``global_step``."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def _table(indices: Sequence[int], values: Sequence[float], dataset: Any) -> tuple[list[str], list[Row]]:
    """Return titles and rows: ids and labels only if the data set tells them."""
    known = annotations_of(dataset)
    told = {name: column for name, column in (("id", known.ids), ("label", known.labels)) if column is not None}
    rows: list[Row] = [
        [row, *(str(column[row]) for column in told.values()), value]
        for row, value in zip(indices, values, strict=True)
    ]
    return ["row", *told, "loss gradient"], rows


def _log_table(logger: Any, titles: list[str], rows: list[Row], step: int) -> None:
    """Log a table to W&B and what has the same method, to TensorBoard and to MLflow; others take none."""
    experiment = getattr(logger, "experiment", None)  # a logger of the user's own may have none
    if hasattr(logger, "log_table"):
        logger.log_table(key=_TABLE, columns=titles, data=rows, step=step)
    elif hasattr(experiment, "add_text"):
        experiment.add_text(_TABLE, _markdown(titles, rows), step)
    elif hasattr(logger, "run_id") and hasattr(experiment, "log_table"):
        columns = dict(zip(titles, map(list, zip(*rows, strict=True)), strict=True))
        experiment.log_table(logger.run_id, columns, f"{_TABLE}.json")


def _markdown(titles: list[str], rows: list[Row]) -> str:
    """Return a table as text; whatever the data contain stays one cell."""
    lines: list[Sequence[str | float]] = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: str | float) -> str:
    text = number_text(value) if isinstance(value, float) else " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
