"""Can the sizes of scores be trusted? Calibrated on a few retrainings; and for sets of examples, by a step for each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_trak import Attribution, GroundTruth, TRAKCallback, calibrate, evaluate
from lightning_trak.evaluation.retraining import Runs, draw_removed
from tests.benchmarks.measuring import print_table, trainer
from tests.benchmarks.quality.runs import check_folder, ground_truth, train, train_run
from tests.benchmarks.quality.tasks import TASKS

ROOT = Path(".benchmarks/quality")
COPIES = 8  # near-duplicates of a target, planted in the train set
NAMES = ("duplicates of a target", "a class", "its 20 most helpful", "its 50 most helpful", "100 at random")


def run(
    keys: Sequence[str] = tuple(TASKS),
    with_sets: Sequence[str] = ("digits", "noisy", "diabetes"),
    root: Path = ROOT,
    n_subsets: int = 100,
    fitted_on: Sequence[int] = (10, 20),
    repeats: int = 3,
    n_sets: int = 10,
    choices: int = 5,
) -> None:
    """Print both tables; what was trained for the benchmark ``quality`` is used again."""
    print_table(
        "calibrate, all checkpoints of 1 run, evaluated on other subsets",
        ["task", "subsets", "LDS", "calibrated", "slope", "calibrated"],
        (row for key in keys for row in _calibrated(key, root, n_subsets, fitted_on, choices)),
        f"Means over {choices} random choices of the subsets; the slope of actual against predicted changes is 1 for"
        " right sizes.",
    )
    print_table(
        "Leaving out sets, all checkpoints of 1 run, every set and target",
        [
            "task",
            "left out",
            "correlation, sum",
            "without",
            "slope, sum",
            "without",
            "error, sum",
            "without",
            "own targets, actual",
            "sum",
            "without",
        ],
        (row for key in with_sets for row in _sets(key, root, repeats, n_sets)),
        f"{repeats} trainings without each of {n_sets} sets. The error is that of predicted changes, relative to the"
        " actual ones (roots of mean squares); 1 is that of predicting no change. The last columns are mean changes of"
        " the own targets: those that the copies are of, those of the class, or those that were helped.",
    )


def _attribute(key: str, root: Path, data: Any, files: Sequence[Path], store: str) -> Attribution:
    own = trainer(root, TRAKCallback(store), accelerator="cpu")
    return own.attribute(TASKS[key].make_module(), datamodule=data, ckpt_path=list(files))


def _calibrated(key: str, root: Path, n_subsets: int, fitted_on: Sequence[int], choices: int) -> Iterator[list[str]]:
    check_folder(key, root)
    truth = ground_truth(key, root, n_subsets, 2)
    with tempfile.TemporaryDirectory() as store:
        attribution = _attribute(key, root, TASKS[key].data(), train_run(key, root, 0), store)
        for count in fitted_on:
            numbers = []
            for seed in range(choices):
                order = torch.randperm(n_subsets, generator=torch.Generator().manual_seed(seed))
                some, others = (_part(truth, own) for own in (order[:count], order[max(fitted_on) :]))
                found = [evaluate(one, others) for one in (attribution, calibrate(attribution, some))]
                numbers.append([one.lds for one in found] + [one.slope for one in found])
            means = torch.tensor(numbers).mean(0).tolist()
            yield [
                TASKS[key].name,
                str(count),
                *(f"{mean:.3f}" for mean in means[:2]),
                *(f"{x:.2f}" for x in means[2:]),
            ]


def _part(truth: GroundTruth, subsets: Tensor) -> GroundTruth:
    return GroundTruth(truth.masks[subsets], truth.repeats[subsets])


def _sets(key: str, root: Path, repeats: int, n_sets: int) -> Iterator[list[str]]:
    """Plant near-duplicates of targets, train, and leave out sets of several kinds, each with all targets."""
    task, folder = TASKS[key], root / key / "sets"
    data = task.data()
    copies = _plant_copies(data, n_sets)

    def make_trainer() -> Any:
        return trainer(root, accelerator="cpu", max_epochs=task.epochs, enable_checkpointing=False)

    with tempfile.TemporaryDirectory() as store:
        attribution = _attribute(key, root, data, train(key, root, data, folder / "run", 0), store)
        labels, of_targets = data.train_set.tensors[1], data.targets.tensors[1]
        sets = dict(zip(NAMES, _masks(attribution, copies, labels), strict=True))
        runs = Runs(task.make_module, data, make_trainer, folder / "runs", None, {"seed": 0})
        whole = torch.ones(attribution.info.n_train, dtype=torch.bool)
        before = _outputs(runs, "before", whole[None], repeats)
        for name, masks in sets.items():
            if len(masks):
                actual = _outputs(runs, name, ~masks, repeats) - before
                changes = [-(masks.float() @ attribution.scores), attribution.without(masks) - attribution.outputs]
                pairs = zip(*(_agreement(one, actual) for one in changes), strict=True)
                own = _own(name, len(masks), labels, of_targets)
                means = ["–" if own is None else f"{one[own].mean():.2f}" for one in (actual, *changes)]
                yield [task.name, name, *(f"{one:.2f}" for measure in pairs for one in measure), *means]


def _plant_copies(data: Any, n_sets: int) -> Tensor:
    """Replace training examples, drawn at random, by copies of the first targets with a little noise; return a mask."""
    generator = torch.Generator().manual_seed(1)
    (x, y), (targets, labels) = (tuple(part.clone() for part in one.tensors) for one in (data.train_set, data.targets))
    rows = torch.randperm(len(x), generator=generator)[: n_sets * COPIES].reshape(n_sets, COPIES)
    masks = torch.zeros(n_sets, len(x), dtype=torch.bool).scatter_(1, rows, True)
    for own, target, label in zip(rows, targets, labels, strict=False):
        x[own] = target + 0.05 * targets.std() * torch.randn(COPIES, *target.shape, generator=generator)
        y[own] = label
    data.train_set = TensorDataset(x, y)
    return masks


def _masks(attribution: Attribution, copies: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Yield the sets of each kind, (sets, n)."""
    n, n_sets = attribution.info.n_train, len(copies)
    best = attribution.top(50).indices[n_sets : 2 * n_sets]
    nothing = torch.zeros(len(best), n, dtype=torch.bool)
    yield copies
    yield labels == labels.unique()[:, None] if not labels.is_floating_point() else nothing[:0]
    yield nothing.scatter(1, best[:, :20], True)
    yield nothing.scatter(1, best, True)
    yield torch.stack([~draw_removed(n, 100, 0, number) for number in range(n_sets)])


def _own(name: str, n_sets: int, labels: Tensor, of_targets: Tensor) -> Tensor | None:
    """Return the own targets of each set, (sets, m), bool; None for random sets."""
    nothing = torch.zeros(n_sets, len(of_targets), dtype=torch.bool)
    if name == NAMES[1]:
        return of_targets == labels.unique()[:, None]
    if name == NAMES[-1]:
        return None
    first = 0 if name == NAMES[0] else n_sets
    return nothing.scatter(1, torch.arange(first, first + n_sets)[:, None], True)


def _outputs(runs: Runs, name: str, masks: Tensor, repeats: int) -> Tensor:
    """Train on sets, and return the mean outputs of the targets, (sets, m)."""
    names = [
        [f"{name.replace(' ', '-')}-{number}-{repeat}" for repeat in range(repeats)] for number in range(len(masks))
    ]
    jobs = [
        (own, mask, f"0:{repeat}") for row, mask in zip(names, masks, strict=True) for repeat, own in enumerate(row)
    ]
    found = runs.complete(jobs, name)
    return torch.stack([torch.stack([found[own] for own in row]).mean(0) for row in names])


def _agreement(predicted: Tensor, actual: Tensor) -> list[float]:
    """Return correlation, slope and relative error of predicted changes."""
    p, y = predicted.flatten().double(), actual.flatten().double()
    error = ((p - y).square().mean() / y.square().mean()).sqrt()
    return [torch.corrcoef(torch.stack([p, y]))[0, 1].item(), (p @ y / (p @ p)).item(), error.item()]
