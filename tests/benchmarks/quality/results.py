"""What the methods reached."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_trak.evaluation.ground_truth import Evaluation


@dataclass
class Result:
    """What a method reached in a cell of the table.

    Attributes:
        evaluation: its LDS.
        predictions: what its scores predict of the targets after training on every subset, (s, m).
        seconds: of training and attribution.
    """

    evaluation: Evaluation
    predictions: Tensor
    seconds: float


@dataclass
class Table:
    """The results of a task.

    Attributes:
        ceiling: the noise ceiling, the highest LDS that scores can reach.
        results: by cell and method.
    """

    ceiling: float | None
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
