"""What the report shows of targets and training examples, as values that JSON can hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_trak.influence import Ranked
from lightning_trak.results.examples import Examples
from lightning_trak.results.kinds import Scalar
from lightning_trak.results.numbers import number_text
from lightning_trak.results.report.data_set import PREDICTION, DataSet, texts
from lightning_trak.results.report.drawing import Drawings, Render
from lightning_trak.results.report.png import PALETTE
from lightning_trak.results.report.suspects import ListedSuspects
from lightning_trak.results.sides import check_finite, of_sign
from lightning_trak.results.values import class_of, label_text

_CLASSES = 200  # with more labels than that, there is nothing to choose from
_WHOLE = 20  # with more whole numbers than that among real ones, they are no classes


@dataclass(frozen=True)
class Known:
    """What an attribution knows.

    Attributes:
        info: how scores were computed, by the names of `AttributionInfo`.
        top: the most helpful training examples of every target, (m, k).
        bottom: the most harmful, (m, k).
        errors: the standard errors of both, (m, k) each; None where they are not known.
        outputs: f of every target, (m,); None where it is not known.
        train: the n training examples.
        targets: the m targets.
        convergence: numbers of checkpoints, and how well their halves agree; None where that is not known.
        partial: whether only the highest and lowest scores of each target were kept.
    """

    info: Mapping[str, Any]
    top: Ranked
    bottom: Ranked
    errors: tuple[Tensor, Tensor] | None
    outputs: Tensor | None
    train: Examples
    targets: Examples
    convergence: tuple[Sequence[int], Sequence[float]] | None = None
    partial: bool = False


def content(
    known: Known, train: Any, targets: Any, render: Render | None, suspects: ListedSuspects | None
) -> dict[str, Any]:
    """Return what is shown, and as ``"drawn"`` how each example is drawn.

    Raises:
        ValueError: if a data set has another length than the attribution, or a score is not finite.
        TypeError: if ``render`` returns what cannot be drawn.
    """
    check_finite(known.top, known.bottom)
    m, rows = len(known.targets), set(suspects.rows if suspects else ())
    rows |= {row for ranked in (known.top, known.bottom) for row in ranked.indices.flatten().tolist()}
    drawings = Drawings((m if targets is not None else 0) + (len(rows) if train is not None else 0), render)
    own = DataSet("targets", known.targets, targets, drawings)
    others = DataSet("train", known.train, train, drawings)
    helpful, harmful = of_sign(known.top, 1), of_sign(known.bottom, -1)
    for target in range(m):  # before all training examples: a search reads the targets alone
        own.shown(target)
    for target in range(m):  # a page needs drawings that are near each other
        for row, _ in (*helpful[target], *harmful[target]):
            others.shown(row)
    found = None if suspects is None else suspects.content(others)
    return {
        "targets": own.content() | _outputs(known.outputs, m) | _verdicts(own) | _classes(own),
        "helpful": _side(helpful, known.errors and known.errors[0], own, others),
        "harmful": _side(harmful, known.errors and known.errors[1], own, others),
        "train": others.content(),
        "suspects": found,
        "tables": [list(names) for names in drawings.tables],
        "palette": PALETTE,
        "searchable": any(
            drawing["kind"] not in ("image", "series") for drawings_ in drawings.drawn for drawing in drawings_
        ),
        "drawn": drawings.drawn,
    }


def _side(
    ranked: Sequence[Sequence[tuple[int, float]]], errors: Tensor | None, targets: DataSet, train: DataSet
) -> dict[str, Any]:
    """Return places of training examples, scores with their errors, and how examples differ from each target."""
    known = None if errors is None else zip(errors.tolist(), ranked, strict=True)
    tables = targets.drawings.tables
    return {
        "places": [[train.shown(row) for row, _ in one] for one in ranked],
        "scores": [[_rounded(value) for _, value in one] for one in ranked],
        "texts": [[number_text(value, signed=True) for _, value in one] for one in ranked],
        "errors": known and [list(map(number_text, values[: len(one)])) for values, one in known],
        "marks": [_marks(targets, place, train, one) for place, one in enumerate(ranked)] if tables else None,
    }


def _marks(
    targets: DataSet, target: int, train: DataSet, ranked: Sequence[tuple[int, float]]
) -> list[list[tuple[int, int]]]:
    """Return in which columns of its table each training example differs most from a target."""
    own, others = targets.drawing(target), [train.drawing(row) for row, _ in ranked]
    return [[] if own is None or other is None else targets.drawings.marks(own, other) for other in others]


def _outputs(outputs: Tensor | None, m: int) -> dict[str, Any]:
    """Return the model outputs, as numbers to sort by and as texts."""
    values = [None] * m if outputs is None else outputs.tolist()
    numbers = [None if value is None or not math.isfinite(value) else _rounded(value) for value in values]
    return {"outputs": numbers, "outputTexts": texts(values)}


def _verdicts(targets: DataSet) -> dict[str, Any]:
    """Return 1 where a prediction is the label, else 0; None where one is unknown, or they are no classes."""
    predictions = targets.column(PREDICTION)
    if not (_are_classes(targets.labels) and _are_classes(predictions)):
        return {"right": [None] * len(predictions)}
    pairs = zip(targets.labels, predictions, strict=True)
    return {"right": [None if None in pair else int(label_text(pair[0]) == label_text(pair[1])) for pair in pairs]}


def _classes(targets: DataSet) -> dict[str, Any]:
    """Return the labels with their numbers of targets; none where they are real numbers, or too many."""
    counts = Counter(class_of(label) for label in targets.labels if label is not None)
    if not _are_classes(targets.labels) or len(counts) > _CLASSES:
        return {"classes": []}
    numbers_first = sorted(counts, key=lambda label: (isinstance(label, str), label))
    return {"classes": [[label_text(label), counts[label]] for label in numbers_first]}


def _are_classes(values: Sequence[Scalar]) -> bool:
    """Say whether labels name classes; whole numbers that are stored as real ones may, if there are few."""
    known = {value for value in values if value is not None}
    if any(class_of(value) is None for value in known):
        return False
    return len(known) <= _WHOLE or not any(isinstance(value, float) for value in known)


def _rounded(value: float) -> float:
    """Return a number with six digits: more would only make the file larger."""
    return float(f"{value:.6g}")
