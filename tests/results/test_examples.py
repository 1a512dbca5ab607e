"""What is known of examples: ids and columns, kept with an attribution."""

from __future__ import annotations

import enum
import json
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_trak import Attribution
from lightning_trak.influence import Extremes, Ranked, Spread
from lightning_trak.results.examples import Examples
from lightning_trak.results.info import AttributionInfo
from lightning_trak.store.files import write_json

SCORES = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
INFO = AttributionInfo(4, 3, ("aa", "bb"), "sparse", 2048, 0.3, True)
TEXTS = ["plain", "</script><b>", "ünïcode 🙂 \udcff", "line\nbreak\0"]


class Kind(enum.IntEnum):
    ODD = 1


def test_ids_are_the_row_numbers_until_told_otherwise():
    attribution = Attribution(SCORES, INFO)
    assert list(attribution.train.ids) == [0, 1, 2, 3]
    assert list(attribution.targets.ids) == [0, 1, 2]
    assert not attribution.train.columns
    assert len(attribution.train), len(attribution.targets) == (4, 3)


def test_values_are_pythons_own_whatever_holds_them():
    given = {
        "tensor": torch.arange(4),
        "array": np.arange(4, dtype=np.float32),
        "numpy scalars": [np.int64(1), np.float64(0.5), np.bool_(True), np.str_("a")],
        "tensor scalars": [torch.tensor(1), torch.tensor(0.5), None, True],
        "enumeration": [Kind.ODD] * 4,
        "generator": (value for value in "abcd"),
    }
    columns = Examples(4, given).columns
    assert columns["tensor"] == (0, 1, 2, 3)
    assert columns["numpy scalars"] == (1, 0.5, True, "a")
    assert columns["tensor scalars"] == (1, 0.5, None, True)
    assert columns["enumeration"] == (1, 1, 1, 1)
    assert columns["generator"] == ("a", "b", "c", "d")
    kinds = {type(value) for column in columns.values() for value in column}
    assert kinds == {int, float, bool, str, type(None)}


def test_series_of_pandas():
    examples = Examples(pd.Series(["a", "b"]), {"label": pd.Series([1, 2])})
    assert (examples.ids, examples.columns["label"]) == (("a", "b"), (1, 2))


def test_columns_are_added_and_replaced_and_the_former_stay_as_they_were():
    first = Attribution(SCORES, INFO).with_columns(train={"label": [0, 1, 2, 3]}, targets={"id": ["a", "b", "c"]})
    second = first.with_columns(train={"label": list("wxyz"), "note": [None] * 4})
    assert first.train.columns == {"label": (0, 1, 2, 3)}
    assert second.train.columns == {"label": ("w", "x", "y", "z"), "note": (None,) * 4}
    assert second.targets.ids == ("a", "b", "c")
    assert second.scores is first.scores
    with pytest.raises(TypeError):
        second.train.columns["label"] = ()


@pytest.mark.parametrize(
    ("columns", "error", "match"),
    [
        ({"label": [1, 2]}, ValueError, "'label' has 2 values for 4 examples"),
        ({"id": [1, 2]}, ValueError, "'id' has 2 values for 4 examples"),
        ({"id": [1, 2, 3, 0.5]}, TypeError, "Ids must be text or integers, got 0.5"),
        ({"id": [1, 2, 3, None]}, TypeError, "Ids must be text or integers, got None"),
        ({"id": [1, 2, 3, True]}, TypeError, "Ids must be text or integers, got True"),
        ({"label": torch.zeros(4, 2)}, TypeError, "'label' has a value of type list"),
        ({"label": [b"a"] * 4}, TypeError, "'label' has a value of type bytes"),
        ({"label": "abcd"}, TypeError, "'label' must have a value for each row, in order; got str"),
        ({"label": torch.tensor(3)}, TypeError, "'label' must have a value for each row"),
        ({"row": [0] * 4}, ValueError, "cannot have the name 'row'"),
        ({3: [0] * 4}, ValueError, "cannot have the name 3"),
        ({"": [0] * 4}, ValueError, "cannot have the name ''"),
    ],
)
def test_what_cannot_be_a_column_is_refused(columns, error, match):
    with pytest.raises(error, match=match):
        Attribution(SCORES, INFO).with_columns(train=columns)


def test_examples_of_another_size_are_refused():
    with pytest.raises(ValueError, match="targets describes 4 examples, and the scores are of 3"):
        Attribution(SCORES, INFO, targets=Examples(4))


def test_rows_of_ids():
    examples = Examples([7, "7", "a", "a", "a"])
    assert examples.rows_of(["7", 7]) == [1, 0]
    with pytest.raises(ValueError, match="3 examples have the id 'a', in the rows 2, 3, 4.*Use their rows"):
        examples.rows_of(["a"])
    with pytest.raises(ValueError, match="No example has the id 'b'; ids are 7 to 'a'"):
        examples.rows_of(["b"])
    with pytest.raises(ValueError, match="No example has the id '1'; there is 1"):
        Examples(3).rows_of(["1"])
    with pytest.raises(ValueError, match="No example has the id 1; there is '1'"):
        Examples(["1"]).rows_of([1])
    for alone in ("7", 7):
        with pytest.raises(TypeError, match=f"must be a list of ids, got {alone!r} alone"):
            examples.rows_of(alone)


def attributions():
    ranked = Ranked(torch.tensor([[3, 1]] * 3), torch.tensor([[0.5, 0.1]] * 3))
    spread = Spread(SCORES.abs(), torch.stack([SCORES, SCORES]))
    return {
        "in memory": Attribution(SCORES, INFO),
        "with spread and outputs": Attribution(SCORES, INFO, spread, outputs=torch.arange(3.0)),
        "extremes": Attribution(Extremes(ranked, ranked), INFO),
    }


@pytest.mark.parametrize("case", attributions())
def test_all_is_saved_and_pickled(tmp_path, case):
    train = {"id": TEXTS, "label": [1, -5, 2**70, 0], "x": [0.1, math.inf, -1e-300, 3.0], "ok": [True, None, False, ""]}
    attribution = attributions()[case].with_columns(train=train, targets={"prediction": TEXTS[:3]})
    attribution.save(tmp_path / "a")
    for found in (Attribution.load(tmp_path / "a"), pickle.loads(pickle.dumps(attribution))):
        assert found.train == attribution.train
        assert found.targets == attribution.targets
        assert [type(value) for value in found.train.columns["ok"]] == [bool, type(None), bool, str]
        assert list(found.targets.ids) == [0, 1, 2]
    assert math.isnan(
        Attribution.load(save(attribution.with_columns(targets={"x": [math.nan] * 3}), tmp_path)).targets.columns["x"][
            0
        ]
    )


def save(attribution, folder):
    attribution.save(folder / "b")
    return folder / "b"


def test_an_earlier_table_is_deleted_and_no_table_is_written_of_row_numbers(tmp_path):
    plain = Attribution(SCORES, INFO)
    for _ in range(2):
        plain.with_columns(train={"label": [0] * 4}).save(tmp_path / "a")
    assert sorted(path.suffix for path in (tmp_path / "a").iterdir()) == [".json", ".json", ".npy"]
    plain.save(tmp_path / "a")
    assert sorted(path.suffix for path in (tmp_path / "a").iterdir()) == [".json", ".npy"]


def test_attributions_saved_by_earlier_versions_are_read(tmp_path):
    Attribution(SCORES, INFO).save(tmp_path / "a")
    path = tmp_path / "a" / "attribution.json"
    index = json.loads(path.read_text())
    del index["tables"]
    write_json(path, {name: value for name, value in index.items() if name != "checksum"})
    assert list(Attribution.load(tmp_path / "a").train.ids) == [0, 1, 2, 3]


def loaded_or_error(folder):
    try:
        return Attribution.load(folder)
    except ValueError as error:
        return error


def test_every_damage_is_noticed(tmp_path):
    attribution = Attribution(SCORES, INFO).with_columns(train={"id": TEXTS, "label": [0, 1, 2, 3]})
    attribution.save(tmp_path / "a")
    noticed = 0
    (path,) = (tmp_path / "a").glob("train-*.json")
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        found = loaded_or_error(tmp_path / "a")
        if isinstance(found, ValueError):
            assert "is damaged" in str(found)
            noticed += 1
        else:  # an escape such as \udcff with a capital letter is the same text
            assert found.train == attribution.train
    assert noticed > 90
    path.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        Attribution.load(tmp_path / "a")


def test_a_table_of_other_examples_is_noticed(tmp_path):
    Attribution(SCORES, INFO).with_columns(train={"label": [0, 1, 2, 3]}).save(tmp_path / "a")
    (path,) = (tmp_path / "a").glob("train-*.json")
    for table in (
        {"ids": 10**15, "columns": {}},
        {"ids": [0.5] * 4, "columns": {}},
        {"ids": 4, "columns": {"a": [{}]}},
    ):
        write_json(path, table)
        with pytest.raises(ValueError, match="is damaged"):
            Attribution.load(tmp_path / "a")


def test_calibrated_scores_keep_what_is_known():
    attribution = Attribution(SCORES, INFO).with_columns(train={"id": TEXTS})
    masks = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    assert attribution.calibrated(masks, masks.float() @ SCORES).train.ids == tuple(TEXTS)
