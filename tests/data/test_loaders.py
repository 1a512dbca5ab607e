"""Rows stay rows, however loaders shuffle; data sets are told apart."""

from __future__ import annotations

import json
import os
import random
import re

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_trak.data.identity import difference, fingerprint, sampled_rows
from lightning_trak.data.loaders import check_loader, loader_batch_size, numbered_loader
from lightning_trak.trainer.host.loaders import TRAIN_REMEDY

DATA = TensorDataset(torch.arange(11) * 10, torch.arange(11))


class Descending(BatchSampler):
    """A batch sampler of one's own, without a batch_size."""

    def __init__(self):
        pass

    def __iter__(self):
        yield from ([i] for i in range(10, -1, -1))

    def __len__(self):
        return 11


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, 4, shuffle=True, drop_last=True),
        DataLoader(DATA, 3, num_workers=2, persistent_workers=True),
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, drop_last=True)),
        DataLoader(DATA, batch_sampler=Descending()),
        DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 11, 5)),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_rows_come_in_the_order_asked_for(loader, batch_size):
    rows = [8, 2, 3, 10, 0]
    seen = []
    for numbers, (x, y) in numbered_loader(loader, rows, batch_size):
        assert len(numbers) <= (batch_size or loader_batch_size(loader))
        assert numbers == y.tolist() == (x // 10).tolist()
        seen += numbers
    assert seen == rows


def test_collate_function_of_the_user():
    loader = DataLoader(DATA, 2, collate_fn=lambda examples: {"text": [f"number {y}" for _, y in examples]})
    assert list(numbered_loader(loader, [3, 1])) == [([3, 1], {"text": ["number 3", "number 1"]})]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Halving(DataLoader):
    def __iter__(self):
        return ((x / 2, y) for x, y in super().__iter__())


WRONG = pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (None, TypeError, "is NoneType; expected one torch.utils.data.DataLoader"),
        ([DataLoader(DATA), DataLoader(DATA)], TypeError, "is list"),
        ({"a": DataLoader(DATA)}, TypeError, "is dict"),
        (DataLoader(Stream()), TypeError, "Stream, an iterable dataset"),
        (Halving(DATA), TypeError, "is Halving, which overrides DataLoader.__iter__"),
        (DataLoader(DATA, batch_size=None), TypeError, "batch_size=None"),
        (DataLoader(Subset(DATA, []), 2), ValueError, "empty dataset"),
        (DataLoader(DATA, 2, sampler=SubsetRandomSampler([1, 2])), ValueError, "reads 2 of the dataset's 11"),
        (DataLoader(DATA, 2, sampler=[4, 5, 6]), ValueError, "reads 3 of the dataset's 11"),
    ],
)


@WRONG
def test_loaders_without_rows(loader, error, message):
    with pytest.raises(error, match=f"^the_loader .*{message}.*Do this."):
        check_loader(loader, "the_loader", "Do this.")


@WRONG
@pytest.mark.parametrize("remedy", ["", TRAIN_REMEDY])
def test_the_messages_of_wrong_loaders_are_whole_sentences(loader, error, message, remedy):
    with pytest.raises(error) as raised:
        check_loader(loader, "train_dataloader", remedy)
    sentences = str(raised.value).removesuffix(".").split(". ")
    assert not [sentence for sentence in sentences if sentence.startswith(("Or ", " ")) or not sentence]
    assert str(raised.value).endswith(remedy or ".")


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"sampler": RandomSampler(DATA, num_samples=3)},
        {"sampler": WeightedRandomSampler([1.0] * 11, 3)},
        {"sampler": SequentialSampler(DATA)},
        {"sampler": SubsetRandomSampler(range(11))},
        {"batch_sampler": Descending()},
    ],
)
def test_loaders_with_rows(options):
    loader = DataLoader(DATA, **options)
    assert check_loader(loader, "x", "") is loader
    assert check_loader([loader], "x", "") is loader


class Examples(Dataset):
    def __init__(self, n, make):
        self.n, self.make = n, make

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        return self.make(row)


FORMS = {
    "tensors": lambda row, change: (torch.tensor([row, change]), row),
    "dict": lambda row, change: {"x": np.array([row + change / 2]), "text": f"{row}"},
    "strings": lambda row, change: f"example {row} {change}",
    "nested": lambda row, change: [{"a": (row, None, [change])}, b"bytes", 1.5],
    "numpy scalars": lambda row, change: (np.float32(row), np.int64(change)),
}


@pytest.mark.parametrize("form", FORMS)
def test_fingerprint_tells_data_apart(form):
    make = FORMS[form]
    base = fingerprint(Examples(20, lambda row: make(row, 0)))
    assert base == fingerprint(Examples(20, lambda row: make(row, 0)))
    assert base != fingerprint(Examples(21, lambda row: make(row, 0)))
    assert base != fingerprint(Examples(20, lambda row: make(19 - row, 0)))
    assert base != fingerprint(Examples(20, lambda row: make(row, int(row == 7))))


def test_fingerprint_reads_little_of_much():
    read = []
    first = fingerprint(Examples(100_000, lambda row: read.append(row) or row))
    assert len(read) == 1024 + 32
    assert {0, 99_999} <= set(read)
    assert first["n_train"] == 100_000
    assert len(json.dumps(first)) < 5000


@pytest.mark.parametrize(
    "noise",
    [
        lambda: torch.rand(1).item(),
        lambda: np.random.rand(),
        lambda: random.random(),
        lambda: os.urandom(4),
    ],
)
def test_fingerprint_does_not_change_with_augmentation(noise):
    def make(row):
        return (row, noise())

    assert fingerprint(Examples(20, make)) == fingerprint(Examples(20, make))
    assert fingerprint(Examples(20, make)) != fingerprint(Examples(20, lambda row: make(row + 1)))


TABLE = torch.arange(100.0).view(20, 5)
VIEWS = {
    "a row of a column": lambda row: TABLE[:, 4][row : row + 1],
    "a number of a row": lambda row: TABLE[row, 2:3],
    "a transposed row": lambda row: TABLE[row : row + 1].T,
    "expanded": lambda row: TABLE[row, 0].expand(3),
    "negative": lambda row: torch.complex(TABLE[row], TABLE[row]).conj().imag,
    "conjugate": lambda row: torch.complex(TABLE[row], TABLE[row]).conj(),
    "nothing": lambda row: TABLE[row, 5:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_fingerprint_is_that_of_values_not_of_views(view):
    make = VIEWS[view]
    found = fingerprint(Examples(20, make))
    assert found == fingerprint(Examples(20, lambda row: torch.tensor(make(row).tolist(), dtype=make(row).dtype)))
    assert (found == fingerprint(Examples(20, lambda row: make((row + 1) % 20)))) == (view == "nothing")


def changed(n, *rows, length=None):
    return fingerprint(Examples(length or n, lambda row: (row, row in rows)))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (changed(40, 7), "as many examples as here, 40, with other content: 1 of 40 compared rows .* row 7"),
        (changed(40, 0, 39), "as many examples as here, 40, with other content: 2 of 40 compared rows .* row 0"),
        (changed(40, length=41), "40 examples, here 41; all 40 compared rows are the same"),
        (changed(40, 12, length=33), "40 examples, here 33, with other content: 1 of 33 compared rows .* row 12"),
        ({"n_train": 40, "data": "of a former version"}, "as many examples as here, 40, with other content"),
    ],
)
def test_where_two_data_sets_differ(now, message):
    assert re.fullmatch(message, difference(changed(40), now))
    assert re.fullmatch(
        message.replace("40 examples, here 33", "33 examples, here 40").replace(
            "40 examples, here 41", "41 examples, here 40"
        ),
        difference(now, changed(40)),
    )


def test_where_two_large_data_sets_differ():
    """Between two compared rows."""
    rows = sampled_rows(5000)
    assert len(rows) == 1024
    found = difference(changed(5000), changed(5000, rows[300], rows[301]))
    assert found.endswith(
        f"2 of 1024 compared rows differ, the first of them one of the rows {rows[299] + 1} to {rows[300]}"
    )


def test_random_parts_make_no_difference_of_rows():
    def make(row):
        return (row, os.urandom(4))

    other = fingerprint(Examples(20, lambda row: make(row + (row == 5))))
    assert "1 of 20 compared rows differ, the first of them row 5" in difference(fingerprint(Examples(20, make)), other)
