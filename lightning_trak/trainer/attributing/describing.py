"""Ids, labels and predictions of the examples that were attributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_trak.data.annotations import Annotations, annotations_of, named
from lightning_trak.gradients import ModelFunction
from lightning_trak.isolation.module_state import ModuleChanged
from lightning_trak.results.examples import Examples
from lightning_trak.store.weights import Weights
from lightning_trak.tasks.base import TRAKMixin, own_method
from lightning_trak.tasks.checks import described_rows
from lightning_trak.trainer.attributing.job import Job
from lightning_trak.trainer.featurizing.reading import ExampleReader
from lightning_trak.trainer.host.framework import rank_zero_info, rank_zero_warn


def described_examples(job: Job, reader: ExampleReader) -> tuple[Examples, Examples]:
    """Return what data sets tell of training examples and targets, and what the module says of the targets.

    The train set's are row numbers if it is not at hand. The first process asks the module, so that all processes end
    with the same.
    """
    loader = job.loaders.train_if_defined()
    own, told = Annotations() if loader is None else annotations_of(loader.dataset), annotations_of(reader.dataset)
    names = {"label": told.classes or own.classes, "prediction": own.classes or told.classes}
    return _examples(job.store.n_train, own), _described(job, reader, told, names)


def described_train(job: Job, reader: ExampleReader) -> Examples:
    """Return what the data set tells of training examples, and what the module says; see `described_examples`."""
    told = annotations_of(reader.dataset)
    return _described(job, reader, told, dict.fromkeys(("label", "prediction"), told.classes))


def _described(job: Job, reader: ExampleReader, told: Annotations, names: Mapping[str, Any]) -> Examples:
    """Return what a data set tells of its examples, and what the module says of them, in every process."""
    examples = _examples(reader.size, told)
    if not isinstance(job.model, TRAKMixin) or own_method(job.model, "describe") is None:
        return examples  # a method of this name that is not of `TRAKMixin` may be about something else
    if job.trainer.is_global_zero:
        examples = _said_by_module(job, reader, examples, names)
    described: Examples = job.trainer.strategy.broadcast(examples)
    return described


def _said_by_module(job: Job, reader: ExampleReader, examples: Examples, names: Mapping[str, Any]) -> Examples:
    """Add what ``describe`` returns. If that fails, scores are not lost, but only these columns."""
    last = job.entries[-1]
    try:
        said = _said_at(reader, last.weights())
        return examples.with_columns({name: named(values, names.get(name)) for name, values in said.items()})
    except Exception as error:  # of the user's code, after all work is done
        if isinstance(error, ModuleChanged) and not error.restored:
            raise
        why = f"{type(error).__name__}: {str(error).rstrip('.')}"
        inherited = str(getattr(job.model.describe, "__module__", "")).startswith("lightning_trak.")
        of_targets = reader.examples == "target"
        if inherited:  # it need not suit this model
            whose = "targets" if of_targets else "training examples"
            rank_zero_info(f"TRAKCallback: labels and predictions of {whose} are not known: {why}.")
        else:
            where = "attribution.targets" if of_targets else "the table of training examples"
            remedy = ", or add columns with attribution.with_columns(targets=...)" if of_targets else ""
            rank_zero_warn(
                f"{type(job.model).__name__}.describe failed, so its columns are not in {where}; scores are"
                f" as they should be. {why}. Correct it{remedy}."
            )
        return examples


def _said_at(reader: ExampleReader, weights: Weights) -> dict[str, list[Any]]:
    """Return what ``describe`` says of all examples at a checkpoint: a value for each row, by name.

    None stands where it said nothing.

    Raises:
        TypeError, ValueError: if it returns anything but a value for each example.
    """
    columns: dict[str, list[Any]] = {}

    def describe(function: ModelFunction, rows: Sequence[int], batch: Any) -> None:
        said = function.call(reader.module.describe, batch)
        for name, values in described_rows(reader.module, said, len(rows)).items():
            column = columns.setdefault(name, [None] * reader.size)
            column[rows[0] : rows[-1] + 1] = values

    what = "targets" if reader.examples == "target" else "the train set"
    reader.without_gradients(weights, describe, f"Describing {what}", labelled=False)
    return columns


def _examples(size: int, told: Annotations) -> Examples:
    return Examples(size if told.ids is None else told.ids, {} if told.labels is None else {"label": told.labels})
