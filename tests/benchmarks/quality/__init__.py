"""Do scores predict retraining? Ours, `traker` and EK-FAC, given the very same checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from lightning_trak import evaluate
from lightning_trak.evaluation.ground_truth import GroundTruth
from lightning_trak.metrics import predicted_outputs
from tests.benchmarks.measuring import print_table, seconds
from tests.benchmarks.quality import costs, methods
from tests.benchmarks.quality.every_task import TASKS
from tests.benchmarks.quality.figure import draw
from tests.benchmarks.quality.paired import difference
from tests.benchmarks.quality.results import Result, Table
from tests.benchmarks.quality.runs import check_folder, ground_truth, train_run, training_seconds

FIGURE = Path(__file__).with_name("lds.png")
WHITENED = ("digits", "noisy", "docstrings", "passages", "gpt2", "tags")  # by default


@dataclass(frozen=True)
class Method:
    """A way from checkpoints to scores.

    Attributes:
        score: returns scores, or several of which the best is taken.
        kept: what is kept of it for other cells, whose seconds then count.
        at_most: so many checkpoints.
        keys: of which tasks.
        installed: says whether it can be run.
    """

    score: Callable[[str, Sequence[Path]], Tensor | list[Tensor]]
    kept: Callable[[str], str] | None = None
    at_most: int = 1000
    keys: Sequence[str] = tuple(TASKS)
    installed: Callable[[], bool] = lambda: True


METHODS = {
    "ours": Method(methods.ours),
    "ours, not whitened": Method(partial(methods.ours, preconditioner="none"), keys=WHITENED),
    "ours, damping 0.3": Method(partial(methods.ours, damping=0.3)),
    "ours, as in the paper": Method(methods.paper),
    "traker": Method(methods.traker, lambda key: f"traker{methods.TRAKER_DIM}", at_most=methods.FEW),
    "traker, best λ": Method(methods.traker_tuned, lambda key: f"traker{methods.fewer_features(key)}"),
    "EK-FAC": Method(methods.ekfac, lambda key: "ekfac", installed=methods.has_ekfac),
}
PEERS = ("traker", "traker, best λ", "EK-FAC")
STORING, PASSING = ("ours", "traker", "traker, best λ"), ("ours", "traker", "EK-FAC")


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


def run(
    keys: Sequence[str] = tuple(TASKS),
    n_subsets: int = 100,
    repeats: int = 2,
    root: Path = Path(".benchmarks/quality"),
    figure: Path = FIGURE,
) -> None:
    """Print the tables and draw the figure; trainings and the peers' results are kept in ``root`` for another time."""
    tables: dict[str, Table] = {}
    header = ["task", "checkpoints", *METHODS, "ours − best peer", "slope of ours", "noise ceiling"]
    note = (
        "In brackets half the width of the bootstrap confidence interval of 95 %. 'traker' is that with its defaults,"
        f" λ = 0 and k = 2048 > n. 'best λ' is that of {len(methods.LAMBDAS)} with the highest LDS in the cell."
        " The best peer is the one with the highest LDS in the cell; its interval of 95 % is from a paired bootstrap."
        + ("" if methods.has_ekfac() else " EK-FAC was not measured: the package kronfluence is not installed.")
    )
    rows = (row for key in keys for row in _rows(key, root, n_subsets, repeats, tables))
    print_table(f"LDS, {n_subsets} subsets of half the train set, {repeats} trainings each", header, rows, note)
    draw(tables, figure)
    print_table(
        "What is stored and computed for a checkpoint",
        ["task", *(f"{method}, bytes" for method in STORING), *(f"{method}, passes" for method in PASSING)],
        (_costs(key, root) for key in keys),
        "Bytes are those of a training example's features; EK-FAC stores none, it computes gradients again for every"
        " 100 targets. 'best λ' has more, as many as 'traker', where that is better. Passes are over the train set,"
        " forward / backward; those of traker are read from its source.",
    )


def _rows(key: str, root: Path, n_subsets: int, repeats: int, tables: dict[str, Table]) -> Iterator[list[str]]:
    check_folder(key, root)
    truth = ground_truth(key, root, n_subsets, repeats)
    files = [train_run(key, root, seed) for seed in range(max(cell.runs for cell in CELLS))]
    table = tables[key] = Table(truth.noise_ceiling())
    for cell in CELLS:
        chosen = [file for run in files[: cell.runs] for file in cell.chosen(run)]
        training = sum(training_seconds(key, root, seed) for seed in range(cell.runs))
        for name, method in METHODS.items():
            if key in method.keys and len(chosen) <= method.at_most and method.installed():
                table.results[cell.name, name] = _measure(key, method, chosen, truth, training)
        results = [table.results.get((cell.name, name)) for name in METHODS]
        slope = table.results[cell.name, "ours"].evaluation.slope
        ceiling = "–" if table.ceiling is None else f"{table.ceiling:.2f}"
        yield [TASKS[key].name, cell.name, *map(_shown, results), _lead(table, cell, truth), f"{slope:.2f}", ceiling]


def _measure(key: str, method: Method, files: list[Path], truth: GroundTruth, training: float) -> Result:
    """Score, and compare with the ground truth; of several scores, the best is taken."""
    found: list[Tensor | list[Tensor]] = []
    taken = seconds(lambda: found.append(method.score(key, files)))
    if method.kept is not None:
        taken = methods.cost(files, method.kept(key))
    candidates = found[0] if isinstance(found[0], list) else [found[0]]
    evaluations = [evaluate(scores, truth) for scores in candidates]
    best = max(range(len(candidates)), key=lambda number: evaluations[number].lds)
    return Result(evaluations[best], predicted_outputs(candidates[best], truth.masks), training + taken)


def _shown(result: Result | None) -> str:
    if result is None:
        return "–"
    lower, upper = (bound.item() for bound in result.evaluation.interval)
    return f"{result.evaluation.lds:.3f} (±{(upper - lower) / 2:.3f})"


def _lead(table: Table, cell: Cell, truth: GroundTruth) -> str:
    """Return by how much ours is ahead of the best peer in a cell, with the interval."""
    peers = [table.results[cell.name, name] for name in PEERS if (cell.name, name) in table.results]
    if not peers:
        return "–"
    best = max(peers, key=lambda peer: peer.evaluation.lds)
    found = difference(table.results[cell.name, "ours"].predictions, best.predictions, truth.outputs)
    return f"{found.value:+.3f} ({found.lower:+.3f} to {found.upper:+.3f})"


def _costs(key: str, root: Path) -> list[str]:
    """Return what the methods store and compute for the last checkpoint of the first run."""
    file = train_run(key, root, 0)[-1]
    stored, passes = costs.ours(key, file)
    trakers = [f"{4 * k}" for k in (methods.TRAKER_DIM, methods.fewer_features(key))]
    ekfac = str(costs.ekfac(key, file)) if METHODS["EK-FAC"].installed() else "–"
    return [TASKS[key].name, f"{stored:.0f}", *trakers, str(passes), str(costs.TRAKER), ekfac]
