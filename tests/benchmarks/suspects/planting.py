"""Train sets with planted faults: wrong labels, copies of examples, and copies of targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.utils.data import TensorDataset

from tests.benchmarks.quality.tasks import Data

MISLABELLED, COPIES, LEAKS = 0.04, 20, 10  # of each kind: a part of the train set, and numbers of examples
TOO_FAR = 2.0  # standard deviations by which a wrong number is too high or too low

Fields = tuple[Tensor, ...]  # the tensors of a data set; most have inputs and labels


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


@dataclass(frozen=True)
class Faults:
    """What is wrong with a mislabelled example, and with a noisy copy.

    Attributes:
        mislabel: returns all fields, with some rows mislabelled: ``mislabel(fields, rows, generator)``.
        noisy: returns noisy copies of some examples: ``noisy(copies, fields, generator)``.
    """

    mislabel: Callable[[Fields, Tensor, Generator], Fields]
    noisy: Callable[[Fields, Fields, Generator], Fields]


def plant(data: Data, faults: Faults, seed: int, *, wrong_labels: bool = True) -> Planted:
    """Mislabel some examples, and add copies of others and of targets, half of them noisy."""
    generator = torch.Generator().manual_seed(seed)
    fields, targets = data.train_set.tensors, data.targets.tensors
    n, order = len(data.train_set), torch.randperm(len(data.train_set), generator=generator)
    bad, sources = order[: int(MISLABELLED * n)], order[int(MISLABELLED * n) :][:COPIES]
    mislabelled = faults.mislabel(fields, bad, generator)
    if wrong_labels:
        fields = mislabelled
    leaked = torch.randperm(len(data.targets), generator=generator)[:LEAKS]
    half = COPIES // 2, LEAKS // 2
    added = [
        _rows(fields, sources[: half[0]]),
        faults.noisy(_rows(fields, sources[half[0] :]), fields, generator),
        _rows(targets, leaked[: half[1]]),
        faults.noisy(_rows(targets, leaked[half[1] :]), fields, generator),
    ]
    whole = tuple(torch.cat(parts) for parts in zip(fields, *added, strict=True))
    total = n + COPIES + LEAKS
    shuffled = torch.randperm(total, generator=generator)
    places = shuffled.argsort()
    wrong, exact = torch.zeros(2, total, dtype=torch.bool)
    copy_of, leak_of = torch.full((2, total), -1)
    wrong[bad] = wrong_labels
    copy_of[n : n + COPIES], leak_of[n + COPIES :] = places[sources], leaked
    exact[n : n + half[0]] = exact[n + COPIES : n + COPIES + half[1]] = True
    data.train_set = TensorDataset(*_rows(whole, shuffled))
    return Planted(data, *(values[shuffled] for values in (wrong, copy_of, leak_of, exact)))


def _rows(fields: Fields, rows: Tensor) -> Fields:
    return tuple(field[rows] for field in fields)


def other_class(fields: Fields, rows: Tensor, generator: Generator) -> Fields:
    """Give examples another class."""
    x, y = fields[0], fields[1].clone()
    classes = int(y.max()) + 1
    for row in rows.tolist():
        y[row] = (y[row] + torch.randint(1, classes, (), generator=generator)) % classes
    return x, y


def far_number(fields: Fields, rows: Tensor, generator: Generator) -> Fields:
    """Give examples a number that is too high or too low."""
    x, y = fields[0], fields[1].clone()
    for row in rows.tolist():
        y[row] += TOO_FAR * (2 * torch.randint(2, (), generator=generator) - 1)
    return x, y


def wrong_tag(fields: Fields, rows: Tensor, generator: Generator) -> Fields:
    """Make one tag of each example wrong."""
    x, y = fields[0], fields[1].clone()
    for row in rows.tolist():
        tag = torch.randint(y.shape[1], (), generator=generator)
        y[row, tag] = 1 - y[row, tag]
    return x, y


def shuffled_words(fields: Fields, rows: Tensor, generator: Generator) -> Fields:
    """Shuffle the words of texts that are their own labels."""
    x = fields[0].clone()
    for row in rows.tolist():
        x[row] = x[row, torch.randperm(x.shape[1], generator=generator)]
    return x, x


def noise(copies: Fields, fields: Fields, generator: Generator) -> Fields:
    """Add a tenth of the standard deviation to the inputs."""
    return add_noise(copies[0], fields[0], generator), *copies[1:]


def add_noise(values: Tensor, of: Tensor, generator: Generator) -> Tensor:
    """Return values with a tenth of a standard deviation added, that of all examples."""
    return values + 0.1 * of.std() * torch.randn(values.shape, generator=generator)


def other_words(copies: Fields, fields: Fields, generator: Generator) -> Fields:
    """Replace two words of the inputs."""
    x = copies[0].clone()
    for copy in x:
        places = torch.randint(max(1, int((copy != 0).sum())), (2,), generator=generator)
        copy[places] = torch.randint(1, int(fields[0].max()) + 1, (2,), generator=generator)
    return x, *copies[1:]


def other_words_of_own_label(copies: Fields, fields: Fields, generator: Generator) -> Fields:
    """Replace two words of texts that are their own labels."""
    x, *_ = other_words(copies, fields, generator)
    return x, x
