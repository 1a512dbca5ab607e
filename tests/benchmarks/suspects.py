"""Are planted faults found? Mislabels, near-duplicates, leaked targets; and is the model better without them?

Beside the loss, self-influence, `cleanlab` where it is installed, and cosines of embeddings and of raw inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Suspects, TRAKCallback
from lightning_trak.influence import nearest
from tests.benchmarks.measuring import print_table, trainer
from tests.benchmarks.quality import TASKS
from tests.benchmarks.quality.tags import TAGS
from tests.benchmarks.quality.tasks import Data

MISLABELLED, COPIES, LEAKS = 0.04, 20, 10  # of each kind: a part of the train set, and numbers of examples
TOO_FAR = 2.0  # standard deviations by which a wrong number is too high or too low


@dataclass(frozen=True)
class Case:
    """A task of the quality benchmark, with planted faults.

    Attributes:
        key: of the task.
        epochs: of the training.
        memorised: whether nothing is wrong with the labels by the end of training, as far as the loss tells.
    """

    key: str
    epochs: int
    memorised: bool = False

    @property
    def name(self) -> str:
        """In tables."""
        return TASKS[self.key].name.removesuffix(", label noise") + (", memorised" if self.memorised else "")


CASES = (
    Case("digits", 15),
    Case("noisy", 30, memorised=True),
    Case("cancer", 20),
    Case("docstrings", 12, memorised=True),
    Case("diabetes", 20),
    Case("tags", 25),
    Case("passages", 12),
)


@dataclass
class Planted:
    """A train set with planted faults.

    Attributes:
        data: train set and targets.
        wrong: which labels are wrong, (n,).
        copy_of: the row of which an example is a copy, (n,); −1 for none.
        leaks: the target of which an example is a copy, (n,); −1 for none.
        exact: which copies are exact, (n,); others are noisy.
    """

    data: Data
    wrong: Tensor
    copy_of: Tensor
    leaks: Tensor
    exact: Tensor


def plant(key: str, seed: int, *, wrong_labels: bool = True) -> Planted:
    """Mislabel some examples, and add copies of others and of targets, half of them noisy."""
    generator = torch.Generator().manual_seed(seed)
    data = TASKS["digits" if key == "noisy" else key].data()
    (x, y), (target_x, target_y) = data.train_set.tensors, data.targets.tensors
    y = _right_tags(x) if key == "tags" else y.clone()
    n, order = len(x), torch.randperm(len(x), generator=generator)
    bad, sources = order[: int(MISLABELLED * n)], order[int(MISLABELLED * n) :][:COPIES]
    wrong_x, wrong_y = x.clone(), y.clone()
    _mislabel(key, wrong_x, wrong_y, bad, generator)
    if wrong_labels:
        x, y = wrong_x, wrong_y
    leaked = torch.randperm(len(target_x), generator=generator)[:LEAKS]
    half = COPIES // 2, LEAKS // 2
    copies = [x[sources[: half[0]]], _noisy(x[sources[half[0] :]], x, generator)]
    leaks = [target_x[leaked[: half[1]]], _noisy(target_x[leaked[half[1] :]], x, generator)]
    inputs = torch.cat([x, *copies, *leaks])
    labels = inputs if key == "passages" else torch.cat([y, y[sources], target_y[leaked]])
    shuffled = torch.randperm(len(inputs), generator=generator)
    places = shuffled.argsort()
    wrong, exact = torch.zeros(2, len(inputs), dtype=torch.bool)
    copy_of, leak_of = torch.full((2, len(inputs)), -1)
    wrong[bad] = wrong_labels
    copy_of[n : n + COPIES], leak_of[n + COPIES :] = places[sources], leaked
    exact[n : n + half[0]] = exact[n + COPIES : n + COPIES + half[1]] = True
    data.train_set = TensorDataset(inputs[shuffled], labels[shuffled])
    return Planted(data, *(values[shuffled] for values in (wrong, copy_of, leak_of, exact)))


def _mislabel(key: str, x: Tensor, y: Tensor, rows: Tensor, generator: torch.Generator) -> None:
    """Give examples wrong labels, of whatever kind the task has; a text is wrong if its words are shuffled."""
    for row in rows.tolist():
        if key == "passages":
            x[row] = x[row, torch.randperm(x.shape[1], generator=generator)]
        elif key == "tags":
            tag = torch.randint(y.shape[1], (), generator=generator)
            y[row, tag] = 1 - y[row, tag]
        elif y.is_floating_point():
            y[row] += TOO_FAR * (2 * torch.randint(2, (), generator=generator) - 1)
        else:
            classes = int(y.max()) + 1
            y[row] = (y[row] + torch.randint(1, classes, (), generator=generator)) % classes


def _noisy(copies: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return copies with a tenth of the standard deviation added, or two words replaced."""
    copies = copies.clone()
    if copies.is_floating_point():
        return copies + 0.1 * x.std() * torch.randn(copies.shape, generator=generator)
    for copy in copies:
        places = torch.randint(max(1, int((copy != 0).sum())), (2,), generator=generator)
        copy[places] = torch.randint(1, int(x.max()) + 1, (2,), generator=generator)
    return copies


def _right_tags(x: Tensor) -> Tensor:
    """Return the tags before some were made wrong."""
    digits = TASKS["digits"].data().train_set.tensors  # in the same order
    assert torch.equal(digits[0], x)
    return torch.tensor([[float(digit in having) for having in TAGS.values()] for digit in digits[1].tolist()])


@dataclass
class Found:
    """What was measured of a case.

    Attributes:
        suspects: of `trainer.suspects`.
        rankings: how suspicious each label is, (n,), by method.
        copies: the cosine with the nearest earlier example, (n,), by method.
        leaks: the cosine with the nearest target, (n,), by method.
    """

    suspects: Suspects
    rankings: dict[str, Tensor]
    copies: dict[str, Tensor]
    leaks: dict[str, Tensor]


def find(case: Case, planted: Planted, seed: int, root: str, epochs: int | None = None) -> Found:
    """Train on a train set, and look for its faults by every method."""
    L.seed_everything(seed, verbose=False)
    module, data = TASKS[case.key].make_module(), planted.data
    saving = ModelCheckpoint(f"{root}/files", save_top_k=-1, save_weights_only=True, filename="{epoch}")
    own = trainer(
        root, saving, TRAKCallback(f"{root}/trak", proj_dim=512), accelerator="cpu", max_epochs=epochs or case.epochs
    )
    own.fit(module, datamodule=data)
    suspects = own.suspects(targets=True)
    losses = []
    for epoch in range(epochs or case.epochs):
        module.load_state_dict(torch.load(f"{root}/files/epoch={epoch}.ckpt", weights_only=True)["state_dict"])
        losses.append(_evaluated(module, data.train_set)[0])
    rankings = {
        "suspects": suspects.findings.loss,
        "loss, last": losses[-1],
        "loss, mean": torch.stack(losses).mean(0),
        "self-influence": suspects.findings.self_influence,
    }
    y = data.train_set.tensors[1]
    if find_spec("cleanlab") and y.ndim == 1 and not y.is_floating_point():
        from cleanlab.rank import get_label_quality_scores

        probabilities = _evaluated(module, data.train_set)[2].softmax(1).numpy()
        rankings["cleanlab"] = -torch.tensor(get_label_quality_scores(y.numpy(), probabilities))
    embedded = [_evaluated(module, one)[1] for one in (data.train_set, data.targets)]
    raw = [one.tensors[0].flatten(1).float() for one in (data.train_set, data.targets)]
    copies, leaks = {"suspects": suspects.findings.similarity}, {"suspects": suspects.findings.leak_similarity}
    for name, (train, targets) in (("embeddings", embedded), ("raw inputs", raw)):
        rows, others = (nn.functional.normalize(one - train.mean(0)) for one in (train, targets))
        copies[name], leaks[name] = nearest(rows)[1], nearest(rows, others)[1]
    return Found(suspects, rankings, copies, leaks)


@torch.no_grad()
def _evaluated(module: Any, examples: TensorDataset) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, what the last linear layer gets, and predictions."""
    module.eval()
    inputs: list[Tensor] = []
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    x, y = examples.tensors
    predictions = module(x)
    hook.remove()
    embedded = inputs[0].mean(1) if inputs[0].ndim == 3 else inputs[0]
    return module.loss(predictions, y), embedded, predictions


RANKINGS = ("suspects", "loss, last", "loss, mean", "self-influence", "cleanlab")
COSINES = ("suspects", "embeddings", "raw inputs")


def run(cases: tuple[Case, ...] = CASES, seeds: tuple[int, ...] = (10, 11), epochs: int | None = None) -> None:
    """Print the tables."""
    found = [[_with_store(case, seed, epochs, wrong_labels=True) for seed in seeds] for case in cases]
    clean = [[_with_store(case, seed, epochs, wrong_labels=False) for seed in seeds[:1]] for case in cases]
    named = "named: precision / recall"
    header = ["task", *RANKINGS, named, "named where all labels are right"]
    title = "Mislabels: average precision of rankings"
    print_table(title, header, map(_mislabel_row, cases, found, clean), f"{MISLABELLED:.0%} of the labels are wrong.")
    header = ["task", "what", *COSINES, named]
    rows = (row for case, several in zip(cases, found, strict=True) for row in _copy_rows(case, several))
    print_table("Near-duplicates and leaks: average precision of rankings", header, rows)
    if any(case.key == "noisy" for case in cases):
        header = ["removed", "number", "of them mislabelled", "accuracy"]
        noisy = next(several for case, several in zip(cases, found, strict=True) if case.key == "noisy")
        rows = _retrained(noisy, TASKS["noisy"].epochs if epochs is None else epochs)
        print_table("Accuracy for the targets after removing suspects: digits, MLP, 4 % of labels wrong", header, rows)


def _with_store(case: Case, seed: int, epochs: int | None, *, wrong_labels: bool) -> tuple[Planted, Found]:
    planted = plant(case.key, seed, wrong_labels=wrong_labels)
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
        pairs = [(*_later(planted, exact=exact), planted, one) for planted, one in found]
        cells = [
            _mean([average_precision_score(is_copy[rows], one.copies[name][rows]) for is_copy, rows, _, one in pairs])
            for name in COSINES
        ]
        named = [((one.suspects.findings.duplicate_of >= 0)[rows], is_copy[rows]) for is_copy, rows, _, one in pairs]
        yield [case.name, what, *cells, _precision_and_recall(named)]
    for what, exact in (("exact leaks", True), ("noisy leaks", False)):
        several = []
        for planted, one in found:
            is_leak = (planted.leaks >= 0) & (planted.exact == exact)
            several.append((is_leak, is_leak | (planted.leaks < 0) & ~_natural(planted), one))
        cells = [
            _mean([average_precision_score(is_leak[rows], one.leaks[name][rows]) for is_leak, rows, one in several])
            for name in COSINES
        ]
        named = [((one.suspects.findings.leaks >= 0)[rows], is_leak[rows]) for is_leak, rows, one in several]
        yield [case.name, what, *cells, _precision_and_recall(named)]


def _later(planted: Planted, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Return which examples are the later ones of a pair of copies, and which rows count.

    Those of the other kind do not, nor do examples that the data hold twice themselves.
    """
    later = torch.zeros(2, len(planted.wrong), dtype=torch.bool)  # noisy, exact
    for row in (planted.copy_of >= 0).nonzero()[:, 0].tolist():
        later[int(planted.exact[row]), max(row, int(planted.copy_of[row]))] = True
    own, other = later[int(exact)], later[1 - int(exact)]
    return own, own | ~other & ~_natural(planted)


def _natural(planted: Planted) -> Tensor:
    """Return which examples have equal inputs in the train set or among the targets, planted or not."""
    x = torch.cat([planted.data.train_set.tensors[0], planted.data.targets.tensors[0]]).flatten(1)
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
    module, kept = TASKS["noisy"].make_module(), torch.ones(len(data.train_set), dtype=torch.bool)
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
