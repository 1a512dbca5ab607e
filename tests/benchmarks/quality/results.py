"""What the methods reached."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_trak.evaluation.ground_truth import Evaluation


@dataclass
class Result:
    """What a method reached in a cell of the table.

    Attributes:
        evaluation: its LDS.
        seconds: of training and attribution.
    """

    evaluation: Evaluation
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
