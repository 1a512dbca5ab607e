"""Are planted faults found? Mislabels, near-duplicates, leaked targets; and is the model better without them?

Beside the loss, self-influence, `cleanlab` where it is installed, and cosines of embeddings and of raw inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from tempfile import TemporaryDirectory

import lightning as L
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Suspects
from tests.benchmarks.measuring import print_table, trainer
from tests.benchmarks.quality.tasks import Data
from tests.benchmarks.suspects.cases import Case
from tests.benchmarks.suspects.every_case import CASES
from tests.benchmarks.suspects.finding import Found, find
from tests.benchmarks.suspects.planting import MISLABELLED, Planted, plant

RANKINGS = ("suspects", "loss, last", "loss, mean", "self-influence", "cleanlab")
COSINES = ("suspects", "embeddings", "raw inputs")


def run(keys: Sequence[str] = tuple(CASES), seeds: Sequence[int] = (10, 11), epochs: int | None = None) -> None:
    """Print the tables."""
    cases = [CASES[key] for key in keys]
    found = [[_with_store(case, seed, epochs, wrong_labels=True) for seed in seeds] for case in cases]
    clean = [[_with_store(case, seed, epochs, wrong_labels=False) for seed in seeds[:1]] for case in cases]
    named = "named: precision / recall"
    header = ["task", *RANKINGS, named, "named where all labels are right"]
    title = "Mislabels: average precision of rankings"
    print_table(title, header, map(_mislabel_row, cases, found, clean), f"{MISLABELLED:.0%} of the labels are wrong.")
    header = ["task", "what", *COSINES, named]
    rows = (row for case, several in zip(cases, found, strict=True) for row in _copy_rows(case, several))
    print_table("Near-duplicates and leaks: average precision of rankings", header, rows)
    if "noisy" in keys:
        header = ["removed", "number", "of them mislabelled", "accuracy"]
        rows = _retrained(found[list(keys).index("noisy")], CASES["noisy"].task.epochs if epochs is None else epochs)
        print_table("Accuracy for the targets after removing suspects: digits, MLP, 4 % of labels wrong", header, rows)


def _with_store(case: Case, seed: int, epochs: int | None, *, wrong_labels: bool) -> tuple[Planted, Found]:
    planted = plant(case.task.data(), case.faults, seed, wrong_labels=wrong_labels)
    with TemporaryDirectory() as root:
        return planted, find(case, planted, seed, root, epochs)


def _mislabel_row(case: Case, found: list[tuple[Planted, Found]], clean: list[tuple[Planted, Found]]) -> list[str]:
    cells = []
    for name in RANKINGS:
        known = [(planted, one.rankings[name]) for planted, one in found if name in one.rankings]
        precisions = [average_precision_score(planted.wrong, values) for planted, values in known]
        cells.append(_mean(precisions))
    named = [(one.suspects.findings.mislabelled, planted.wrong) for planted, one in found]
    false = [one.suspects.findings.mislabelled.float().mean().item() for _, one in clean]
    return [case.name, *cells, _precision_and_recall(named), f"{sum(false) / len(false):.1%}"]


def _copy_rows(case: Case, found: list[tuple[Planted, Found]]) -> Iterator[list[str]]:
    for what, exact in (("exact copies", True), ("noisy copies", False)):
        pairs = [(*_later(case, planted, exact=exact), one) for planted, one in found]
        cells = [
            _mean([average_precision_score(is_copy[rows], one.copies[name][rows]) for is_copy, rows, one in pairs])
            for name in COSINES
        ]
        named = [((one.suspects.findings.duplicate_of >= 0)[rows], is_copy[rows]) for is_copy, rows, one in pairs]
        yield [case.name, what, *cells, _precision_and_recall(named)]
    for what, exact in (("exact leaks", True), ("noisy leaks", False)):
        several = []
        for planted, one in found:
            is_leak = (planted.leaks >= 0) & (planted.exact == exact)
            several.append((is_leak, is_leak | (planted.leaks < 0) & ~_natural(case, planted), one))
        cells = [
            _mean([average_precision_score(is_leak[rows], one.leaks[name][rows]) for is_leak, rows, one in several])
            for name in COSINES
        ]
        named = [((one.suspects.findings.leaks >= 0)[rows], is_leak[rows]) for is_leak, rows, one in several]
        yield [case.name, what, *cells, _precision_and_recall(named)]


def _later(case: Case, planted: Planted, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Return which examples are the later ones of a pair of copies, and which rows count.

    Those of the other kind do not, nor do examples that the data hold twice themselves.
    """
    later = torch.zeros(2, len(planted.wrong), dtype=torch.bool)  # noisy, exact
    for row in (planted.copy_of >= 0).nonzero()[:, 0].tolist():
        later[int(planted.exact[row]), max(row, int(planted.copy_of[row]))] = True
    own, other = later[int(exact)], later[1 - int(exact)]
    return own, own | ~other & ~_natural(case, planted)


def _natural(case: Case, planted: Planted) -> Tensor:
    """Return which examples have equal inputs in the train set or among the targets, planted or not."""
    x = torch.cat([case.raw(one.tensors) for one in (planted.data.train_set, planted.data.targets)])
    _, groups, counts = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
    return (counts[groups] > 1)[: len(planted.wrong)]


def _retrained(found: list[tuple[Planted, Found]], epochs: int) -> Iterator[list[str]]:
    """Train without suspects, and as many examples of other kinds; the targets' labels are right."""
    ways: dict[str, Callable[[Planted, Found, int], Tensor]] = {
        "none": lambda planted, one, k: torch.zeros(0, dtype=torch.long),
        "probably mislabelled": lambda planted, one, k: one.suspects.mislabelled.indices,
        "harmful on average": lambda planted, one, k: one.suspects.harmful.indices,
        "either": lambda planted, one, k: _either(one.suspects),
        "as many with the highest last loss": lambda planted, one, k: one.rankings["loss, last"].topk(k)[1],
        "as many with the highest self-influence": lambda planted, one, k: one.rankings["self-influence"].topk(k)[1],
        "as many at random": lambda planted, one, k: torch.randperm(len(planted.wrong))[:k],
        "all wrong labels": lambda planted, one, k: planted.wrong.nonzero()[:, 0],
    }
    for name, choose in ways.items():
        accuracies, removed, wrong = [], 0, 0
        for planted, one in found:
            rows = choose(planted, one, len(one.suspects.mislabelled))
            removed, wrong = removed + len(rows), wrong + int(planted.wrong[rows].sum())
            accuracies += [_accuracy(planted.data, rows, seed, epochs) for seed in range(3)]
        yield [name, f"{removed / len(found):.0f}", f"{wrong / len(found):.0f}", f"{_average(accuracies):.2%}"]


def _either(suspects: Suspects) -> Tensor:
    return (suspects.findings.mislabelled | suspects.findings.harmful).nonzero()[:, 0]


def _accuracy(data: Data, without: Tensor, seed: int, epochs: int) -> float:
    L.seed_everything(100 + seed, verbose=False)
    module, kept = CASES["noisy"].task.make_module(), torch.ones(len(data.train_set), dtype=torch.bool)
    kept[without] = False
    rest = TensorDataset(*(one[kept] for one in data.train_set.tensors))
    with TemporaryDirectory() as root:
        own = trainer(root, accelerator="cpu", max_epochs=epochs, enable_checkpointing=False)
        own.fit(module, DataLoader(rest, data.batch_size, shuffle=True, drop_last=True))
    x, y = data.targets.tensors
    with torch.no_grad():
        return float((module.eval()(x).argmax(1) == y).float().mean())


def _precision_and_recall(pairs: list[tuple[Tensor, Tensor]]) -> str:
    named, right, planted = (
        sum(int(values.sum()) for values in several)
        for several in (
            [one for one, _ in pairs],
            [one & truth for one, truth in pairs],
            [truth for _, truth in pairs],
        )
    )
    return f"{right / named:.2f} / {right / planted:.2f}" if named else "– / 0.00"


def _mean(values: list[float]) -> str:
    return f"{_average(values):.3f}" if values else "–"


def _average(values: list[float]) -> float:
    return sum(values) / len(values)
