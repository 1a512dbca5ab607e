"""The train set with or without chosen examples."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_trak import Attribution
from lightning_trak.results.info import AttributionInfo

N = 6
TRAIN = TensorDataset(torch.arange(N) * 10)
IDS = [*"abcde", "a"]
INFO = AttributionInfo(N, 2, ("aa",), "sparse", 2048, 0.3, True)


@pytest.fixture
def attribution():
    return Attribution(torch.randn(N, 2), INFO).with_columns(train={"id": IDS})


MASK = [False, True, False, False, True, False]
CHOICES = {
    "rows": [4, 1],
    "a row twice": [1, 4, 1],
    "a tensor": torch.tensor([4, 1]),
    "small integers": torch.tensor([4, 1], dtype=torch.uint8),
    "an array": np.array([4, 1]),
    "a tuple": (1, 4),
    "a mask": MASK,
    "a mask as tensor": torch.tensor(MASK),
    "a mask as array": np.array(MASK),
}


@pytest.mark.parametrize("case", CHOICES)
def test_rows_and_masks(attribution, case):
    kept, left = attribution.keep(TRAIN, CHOICES[case]), attribution.remove(TRAIN, CHOICES[case])
    assert isinstance(kept, Subset)
    assert kept.indices == [1, 4]
    assert left.indices == [0, 2, 3, 5]
    assert [int(x) for (x,) in left] == [0, 20, 30, 50]
    assert next(iter(DataLoader(kept, 2)))[0].tolist() == [10, 40]


def test_rows_of_a_filtered_table(attribution):
    frame = pd.DataFrame({"train_row": [0, 4, 1], "score": [1.0, -1.0, -2.0]})
    assert attribution.remove(TRAIN, frame.train_row[frame.score < 0]).indices == [0, 2, 3, 5]


def test_ids(attribution):
    assert attribution.keep(TRAIN, ids=["e", "b"]).indices == [1, 4]
    assert attribution.remove(TRAIN, ids=["e", "b"]).indices == [0, 2, 3, 5]
    numbered = Attribution(torch.randn(N, 2), INFO).with_columns(train={"id": [1, 2, 3, 4, 5, 0]})
    assert numbered.keep(TRAIN, ids=[0]).indices == [5]
    assert numbered.keep(TRAIN, [0]).indices == [0]


def test_what_is_left_is_a_data_set_as_any_other(attribution):
    once = attribution.remove(TRAIN, [0])
    again = Attribution(torch.randn(N - 1, 2), AttributionInfo(N - 1, 2, ("aa",), "sparse", 2048, 0.3, True))
    assert [int(x) for (x,) in again.remove(once, [0])] == [20, 30, 40, 50]


def test_nothing_to_remove_and_everything_to_keep(attribution):
    assert attribution.remove(TRAIN, []).indices == list(range(N))
    assert attribution.keep(TRAIN, range(N)).indices == list(range(N))


@pytest.mark.parametrize(
    ("train_set", "choice", "error", "match"),
    [
        (TRAIN, {"rows": [6]}, ValueError, r"rows must be rows of the train set, 0 to 5; got \[6\]"),
        (TRAIN, {"rows": [-1]}, ValueError, r"got \[-1\]"),
        (TRAIN, {"rows": [0.5]}, ValueError, "integers; got"),
        (TRAIN, {"rows": 3}, ValueError, "integers; got"),
        (TRAIN, {"rows": torch.zeros(2, 2).long()}, ValueError, r"integers; got \(2, 2\)"),
        (TRAIN, {"rows": [True, False]}, ValueError, r"A mask must have shape \(6,\)"),
        (TRAIN, {"rows": torch.ones(2, 6).bool()}, ValueError, r"one mask, \(6,\), got \(2, 6\)"),
        (TRAIN, {"rows": ["a"]}, TypeError, "got text. Ids are passed as ids="),
        (TRAIN, {"rows": "a"}, TypeError, "got text. Ids are passed as ids="),
        (TRAIN, {"rows": range(6)}, ValueError, "No training example is left"),
        (TRAIN, {"ids": ["a"]}, ValueError, "2 examples have the id 'a', in the rows 0, 5. Use their rows"),
        (TRAIN, {"ids": ["z"]}, ValueError, "No example has the id 'z'"),
        (TRAIN, {"ids": [0]}, ValueError, "No example has the id 0"),
        (TRAIN, {"ids": "b"}, TypeError, "must be a list of ids, got 'b' alone"),
        (TRAIN, {}, TypeError, "by rows, or by ids"),
        (TRAIN, {"rows": [0], "ids": ["b"]}, TypeError, "one of the two"),
        (TensorDataset(torch.arange(5)), {"rows": [0]}, ValueError, "has 5 examples, and the attribution is of 6"),
        (DataLoader(TRAIN), {"rows": [0]}, TypeError, "got DataLoader"),
        (iter(TRAIN), {"rows": [0]}, TypeError, "train_set must be the data set that was attributed"),
    ],
)
def test_what_cannot_be_chosen_is_refused(attribution, train_set, choice, error, match):
    with pytest.raises(error, match=match):
        attribution.remove(train_set, **choice)


def test_nothing_to_keep(attribution):
    with pytest.raises(ValueError, match="No training example is left"):
        attribution.keep(TRAIN, [])


class Files:
    """Tells ids."""

    def __init__(self, *names):
        self.imgs = [(f"{name}.png", 0) for name in names]

    def __len__(self):
        return len(self.imgs)

    def __getitem__(self, row):
        return self.imgs[row]


def test_another_order_of_files_is_noticed():
    known = {"id": [f"{name}.png" for name in "abcdef"]}
    attribution = Attribution(torch.randn(N, 2), INFO).with_columns(train=known)
    assert attribution.keep(Files(*"abcdef"), [1]).indices == [1]
    with pytest.raises(ValueError, match=r"in the order.*row 2 is 'd.png', and was 'c.png'.*a random split needs"):
        attribution.keep(Files(*"abdcef"), [1])
    with pytest.raises(ValueError, match="row 0 is 'x.png', and was 'a.png'"):
        attribution.keep(Files(*"xbcdef"), [1])


def test_a_user_may_rename_the_examples(attribution):
    assert attribution.keep(Files(*"uvwxyz"), [1]).indices == [1]
    assert Attribution(torch.randn(N, 2), INFO).keep(Files(*"uvwxyz"), [1]).indices == [1]
