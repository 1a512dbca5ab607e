"""Do scores predict retraining? Ours, `traker` and EK-FAC, given the very same checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_trak import evaluate
from lightning_trak.ground_truth import Evaluation, GroundTruth
from tests.benchmarks.measuring import print_table, seconds
from tests.benchmarks.quality import methods
from tests.benchmarks.quality.runs import ground_truth, train_run, training_seconds
from tests.benchmarks.quality.tasks import TASKS

METHODS: dict[str, Callable[[str, Sequence[Path]], Tensor | list[Tensor]]] = {
    "ours": methods.ours,
    "ours, as in the paper": methods.paper,
    "traker": methods.traker,
    "traker, best λ": methods.traker_tuned,
    "EK-FAC": methods.ekfac,
}


@dataclass(frozen=True)
class Cell:
    """A choice of checkpoints.

    Attributes:
        name: in the table.
        runs: how many runs they are of.
        chosen: of the epochs' checkpoints of a run, which.
    """

    name: str
    runs: int
    chosen: Callable[[list[Path]], list[Path]]


def _five(files: list[Path]) -> list[Path]:
    return [files[round(len(files) * fifth / 5) - 1] for fifth in range(1, 6)]


CELLS = (
    Cell("last of 1 run", 1, lambda files: files[-1:]),
    Cell("5 of 1 run", 1, _five),
    Cell("all of 1 run", 1, list),
    Cell("last of 10 runs", 10, lambda files: files[-1:]),
    Cell("5 of 4 runs", 4, _five),
    Cell("all of 4 runs", 4, list),
)


@dataclass
class Result:
    """What a method reached in a cell of the table."""

    evaluation: Evaluation
    seconds: float


@dataclass
class Table:
    """The results of a task, by cell and method."""

    ceiling: float | None
    results: dict[tuple[str, str], Result] = field(default_factory=dict)


def run(
    keys: Sequence[str] = tuple(TASKS), n_subsets: int = 100, repeats: int = 2, root: str | Path | None = None
) -> dict[str, Table]:
    """Print the table; ``root`` keeps the trainings for another time."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder if root is None else root)
        tables = {}
        header = ["task", "checkpoints", *METHODS, "slope of ours", "perfect scores"]
        note = "In brackets half the width of the bootstrap confidence interval of 95 %."
        rows = (row for key in keys for row in _rows(key, where, n_subsets, repeats, tables))
        print_table(f"LDS, {n_subsets} subsets of half the train set, {repeats} trainings each", header, rows, note)
        return tables


def _rows(key: str, root: Path, n_subsets: int, repeats: int, tables: dict[str, Table]) -> Iterator[list[str]]:
    truth = ground_truth(key, root, n_subsets, repeats)
    files = [train_run(key, root, seed) for seed in range(max(cell.runs for cell in CELLS))]
    table = tables[key] = Table(truth.noise_ceiling())
    for cell in CELLS:
        chosen = [file for run in files[: cell.runs] for file in cell.chosen(run)]
        training = sum(training_seconds(key, root, seed) for seed in range(cell.runs))
        for method in METHODS:
            table.results[cell.name, method] = _measure(key, method, chosen, truth, training)
        results = [table.results[cell.name, method] for method in METHODS]
        ceiling = "–" if table.ceiling is None else f"{table.ceiling:.2f}"
        yield [TASKS[key].name, cell.name, *map(_shown, results), f"{results[0].evaluation.slope:.2f}", ceiling]


def _measure(key: str, method: str, files: list[Path], truth: GroundTruth, training: float) -> Result:
    """Score, and compare with the ground truth; of several scores, the best is taken."""
    found: list[Tensor | list[Tensor]] = []
    taken = seconds(lambda: found.append(METHODS[method](key, files)))
    candidates: Any = found[0] if isinstance(found[0], list) else [found[0]]
    evaluations = [evaluate(scores, truth) for scores in candidates]
    best = max(range(len(candidates)), key=lambda number: evaluations[number].lds)
    return Result(evaluations[best], training + taken)


def _shown(result: Result) -> str:
    lower, upper = (bound.item() for bound in result.evaluation.interval)
    return f"{result.evaluation.lds:.3f} (±{(upper - lower) / 2:.3f})"
