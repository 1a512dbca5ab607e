"""Suspects: a sequence of training examples, and tables of them."""

from __future__ import annotations

import json
import pickle
import sys

import pandas
import pytest
import torch

from lightning_trak.influence import Findings
from lightning_trak.results.examples import Examples
from lightning_trak.results.suspects import Suspect, Suspects

N = 12
FINDINGS = Findings(
    loss=torch.linspace(0, 1.1, N),
    self_influence=torch.linspace(1, 2, N),
    mislabelled=torch.arange(N) == 4,
    duplicate_of=torch.tensor([-1, -1, 0, *[-1] * 9]),
    similarity=torch.tensor([-1.0, 0.5, 0.995, *[0.5] * 9]),
    leaks=torch.tensor([-1, 1, *[-1] * 10]),
    leak_similarity=torch.tensor([0.1, 0.98, *[0.2] * 10]),
    harmful=torch.arange(N) == 4,
    harm=torch.linspace(-1, 1, N),
)
TRAIN = Examples(
    [f"{row}.png" for row in range(N)],
    {"label": ["cat"] * N, "prediction": ["dog"] * N, "source": list(range(N))},
)
SUSPECTS = Suspects(FINDINGS, TRAIN, Examples(["one", "two"]))


def test_what_is_wrong_comes_first_and_is_named():
    assert SUSPECTS.indices.tolist() == [4, 2, 1, 11, 10, 9, 8, 7, 6, 5, 3, 0]
    assert [one.row for one in SUSPECTS] == SUSPECTS.indices.tolist()
    assert SUSPECTS[0].wrong == ("probably mislabelled", "harmful on average")
    assert SUSPECTS[1].wrong == ("near-duplicate of '0.png' (cosine 0.995)",)
    assert SUSPECTS[2].wrong == ("leaks target 'two' (cosine 0.980)",)
    assert SUSPECTS[3].wrong == ()
    assert (SUSPECTS[1].duplicate_of, SUSPECTS[2].leaks) == ("0.png", "two")
    assert (SUSPECTS[-1].row, SUSPECTS[-1].similarity) == (0, None)
    assert (SUSPECTS[0].label, SUSPECTS[0].prediction, SUSPECTS[0].id) == ("cat", "dog", "4.png")


def test_parts_are_suspects_too():
    assert [part.indices.tolist() for part in (SUSPECTS.wrong, SUSPECTS.mislabelled, SUSPECTS.harmful)] == [
        [4, 2, 1],
        [4],
        [4],
    ]
    assert SUSPECTS.duplicates.indices.tolist() == [2]
    assert SUSPECTS.leaks.indices.tolist() == [1]
    assert SUSPECTS[:2].indices.tolist() == [4, 2]
    assert SUSPECTS[1:].wrong.indices.tolist() == [2, 1]
    assert (len(SUSPECTS), len(SUSPECTS[:5]), len(SUSPECTS[5:5])) == (N, 5, 0)
    with pytest.raises(IndexError):
        SUSPECTS[N]


def test_rows_are_plain_values():
    rows = SUSPECTS.to_rows()
    assert json.loads(json.dumps(rows)) == rows
    assert rows[0] == {
        "source": 4,
        "row": 4,
        "id": "4.png",
        "label": "cat",
        "prediction": "dog",
        "loss": pytest.approx(0.4),
        "self_influence": pytest.approx(1 + 4 / 11),
        "duplicate_of": None,
        "similarity": pytest.approx(0.5),
        "leaks": None,
        "leak_similarity": pytest.approx(0.2),
        "harm": pytest.approx(-1 + 8 / 11),
        "wrong": "probably mislabelled; harmful on average",
    }
    assert list(rows[0]) == [*Suspect.__dataclass_fields__, "source"]  # columns of the train set come last
    assert rows[-1]["wrong"] == ""


def test_a_column_cannot_hide_what_was_found():
    named = Suspects(FINDINGS, TRAIN.with_columns({"loss": ["mine"] * N}))
    assert named.to_rows()[0]["loss"] == pytest.approx(0.4)


def test_without_targets_there_is_nothing_about_them():
    alone = Findings(**{**vars(FINDINGS), "leaks": torch.full((N,), -1), "harm": None})
    one = Suspects(alone, Examples(N))[0]
    assert (one.leaks, one.leak_similarity, one.harm, one.label, one.prediction, one.id) == (*[None] * 5, 4)


def test_data_frame():
    frame = SUSPECTS.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["row"].tolist() == SUSPECTS.indices.tolist()
    assert "wrong" in SUSPECTS[:0].to_pandas().columns
    numbered = Suspects(FINDINGS, Examples(N)).to_pandas()
    assert [type(one) for one in numbered["duplicate_of"][:3]] == [type(None), int, type(None)]
    assert type(numbered["id"][0]) is int


def test_without_pandas_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        SUSPECTS.to_pandas()


def test_printed_table():
    head, names, first, *rest = repr(SUSPECTS).splitlines()
    assert head == (
        "Suspects: 12 of 12 training examples, 1 probably mislabelled, 1 near-duplicate, 1 near-duplicate of a target,"
        " 1 harmful on average"
    )
    assert names.split() == ["row", "id", "label", "prediction", "loss", "self-influence", "what", "is", "wrong"]
    assert first.split()[:5] == ["4", "4.png", "cat", "dog", "0.400"]
    assert rest[-1] == "... and 2 more"
    assert len(rest) == 10
    hostile = Suspects(FINDINGS, Examples([f"{row}\n\t" + "x" * 99 for row in range(N)]))
    assert len(repr(hostile).splitlines()) == 13
    assert repr(SUSPECTS[:0]) == "Suspects: 0 of 12 training examples, nothing wrong was found"


def test_pickled():
    again = pickle.loads(pickle.dumps(SUSPECTS[:5]))
    assert again.to_rows() == SUSPECTS[:5].to_rows()


def test_other_examples_are_refused():
    with pytest.raises(ValueError, match="train has 3 examples, and findings are of 12"):
        Suspects(FINDINGS, Examples(3))
