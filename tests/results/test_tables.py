"""Scores as tables, against loops over the matrix."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
import pytest
import torch

from lightning_trak import Attribution
from lightning_trak.influence import Extremes, Ranked, Spread
from lightning_trak.results.info import AttributionInfo
from tests.results.test_stored_scores import stored

N, M = 11, 5
SCORES = torch.randn(N, M, generator=torch.Generator().manual_seed(3))
SCORES[:, 2] = SCORES[:, 2].abs()  # a target that nothing harms
SCORES[4, 0] = 0.0
ERRORS = torch.rand(N, M, generator=torch.Generator().manual_seed(4))
OUTPUTS = torch.arange(M) / 7
INFO = AttributionInfo(N, M, ("aa", "bb"), "sparse", 2048, 0.3, True)
TRAIN = {"id": [f"{row}.png" for row in range(N)], "label": [row % 3 for row in range(N)]}
TARGETS = {"id": [10 * column for column in range(M)], "label": list("abcde"), "prediction": [None, *"bcde"]}


def extremes(k):
    top, bottom = (SCORES.topk(k, dim=0, largest=largest) for largest in (True, False))
    return Extremes(Ranked(top[1].T, top[0].T), Ranked(bottom[1].T, bottom[0].T))


@pytest.fixture(params=["in memory", "on disk", "extremes"])
def attribution(request, tmp_path):
    scores = {"in memory": SCORES, "on disk": stored(tmp_path / "chunks", 4, SCORES), "extremes": extremes(3)}
    spread = Spread(ERRORS, torch.stack([SCORES, SCORES]))
    found = Attribution(scores[request.param], INFO, spread, outputs=OUTPUTS)
    return found.with_columns(train=TRAIN, targets=TARGETS)


def expected_rows(k):
    """Sort the scores of each target, one after another."""
    for column in range(M):
        ranked = sorted(range(N), key=lambda row: -SCORES[row, column])
        helpful = [row for row in ranked[:k] if SCORES[row, column] > 0]
        harmful = [row for row in ranked[::-1][:k] if SCORES[row, column] < 0]
        for side, chosen in (("helpful", helpful), ("harmful", harmful)):
            for rank, row in enumerate(chosen, 1):
                yield {
                    "target_id": 10 * column,
                    "target_row": column,
                    "side": side,
                    "rank": rank,
                    "train_id": f"{row}.png",
                    "train_row": row,
                    "score": SCORES[row, column].item(),
                    "standard_error": ERRORS[row, column].item(),
                    "target_output": OUTPUTS[column].item(),
                    "target_label": "abcde"[column],
                    "target_prediction": None if column == 0 else "abcde"[column],
                    "train_label": row % 3,
                }


@pytest.mark.parametrize("k", [1, 3])
def test_the_long_form(attribution, k):
    frame = attribution.to_pandas(k=k)
    expected = list(expected_rows(k))
    assert list(frame.columns) == list(expected[0])
    assert frame.to_dict("records") == expected
    assert frame["target_row"].dtype == np.int64
    assert frame["train_label"].dtype == np.int64


def test_a_positive_score_is_never_harmful(attribution):
    frame = attribution.to_pandas(k=100)
    assert (frame.score[frame.side == "helpful"] > 0).all()
    assert (frame.score[frame.side == "harmful"] < 0).all()
    assert "harmful" not in set(frame.side[frame.target_row == 2])
    assert not frame.duplicated(["target_row", "train_row"]).any()


def test_columns_that_are_not_known_are_left_out():
    frame = Attribution(SCORES, INFO).to_pandas()
    assert list(frame.columns) == ["target_id", "target_row", "side", "rank", "train_id", "train_row", "score"]
    assert (frame.train_id == frame.train_row).all()


def test_standard_errors_on_disk(tmp_path):
    errors = stored(tmp_path, 2, ERRORS)
    attribution = Attribution(SCORES, INFO, Spread(errors, torch.stack([SCORES, SCORES])))
    frame = attribution.to_pandas(k=3)
    assert frame["standard_error"].tolist() == [row["standard_error"] for row in expected_rows(3)]


@pytest.mark.parametrize("rows", [[], [0], [10, 0, 3, 3, 7]])
def test_pairs_of_scores_on_disk(tmp_path, rows):
    rows = torch.tensor(rows, dtype=torch.long)
    columns = rows % M
    assert torch.equal(stored(tmp_path, 3, SCORES).picked(rows, columns), SCORES[rows, columns])


@pytest.mark.parametrize("k", [0, -1, True, 2.0])
def test_k_must_be_positive(k):
    with pytest.raises(ValueError, match=f"k must be a positive integer, got {k!r}"):
        Attribution(SCORES, INFO).to_csv("never written", k=k)


def test_the_wide_form(attribution):
    if isinstance(attribution._scores, Extremes):
        with pytest.raises(AttributeError, match="Only the 3 highest"):
            attribution.to_pandas(wide=True)
        return
    frame = attribution.to_pandas(wide=True)
    assert frame.loc["3.png", 20] == SCORES[3, 2].item()
    assert torch.equal(torch.from_numpy(frame.to_numpy(copy=True)), SCORES)
    assert (frame.index.name, frame.columns.name) == ("train_id", "target_id")
    frame.iloc[:, :] = 0
    assert attribution.scores[3, 2] != 0


def test_arrays(attribution):
    if isinstance(attribution._scores, Extremes):
        with pytest.raises(AttributeError, match="Only the 3 highest"):
            np.asarray(attribution)
        return
    assert np.array_equal(np.asarray(attribution), SCORES.numpy())
    assert np.asarray(attribution, dtype=np.float64).dtype == np.float64
    copied = np.array(attribution)
    copied[:] = 0
    assert np.array_equal(np.asarray(attribution), SCORES.numpy())


def test_an_array_of_scores_in_memory_is_no_copy_and_of_scores_on_disk_always_one(tmp_path):
    assert np.shares_memory(np.asarray(Attribution(SCORES, INFO)), SCORES.numpy())
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        on_disk = Attribution(stored(tmp_path, 3, SCORES), INFO)
        with pytest.raises(ValueError, match="without a copy"):
            np.array(on_disk, copy=False)


def test_scores_on_disk_that_do_not_fit_are_not_read(tmp_path):
    class Huge(type(stored(tmp_path, 3, SCORES))):
        """Claims to have more rows than any memory holds."""

        def blocks(self):
            raise AssertionError("was read")

    scores = Huge(stored(tmp_path, 3, SCORES).chunks, 10**15)
    if sys.platform != "linux":
        pytest.skip("the free memory is known on Linux")
    with pytest.raises(MemoryError, match=r"take 4.4e\+07 GB in memory.*scores.blocks"):
        np.asarray(scores)


def test_by_id(attribution):
    if isinstance(attribution._scores, Extremes):
        return
    assert torch.equal(attribution.by_id("3.png", 20), SCORES[3, 2])
    assert torch.equal(attribution.by_id(["3.png", "0.png"], [20, 0, 40]), SCORES[[3, 0]][:, [2, 0, 4]])
    assert torch.equal(attribution.by_id(train="3.png"), SCORES[3])
    assert torch.equal(attribution.by_id(targets=np.int64(20)), SCORES[:, 2])
    assert torch.equal(attribution.by_id(targets=[20]), SCORES[:, [2]])
    for wrong in ({"targets": 2}, {"targets": [20, 1]}, {"train": "3"}, {"train": 3}):
        with pytest.raises(ValueError, match="No example has the id"):
            attribution.by_id(**wrong)


def test_ids_that_are_integers_are_never_taken_for_rows():
    named = Attribution(SCORES, INFO).with_columns(train={"id": list(range(1, N + 1))})
    assert torch.equal(named.by_id(train=1), SCORES[0])
    with pytest.raises(ValueError, match="No example has the id 0"):
        named.by_id(train=0)
    twice = Attribution(SCORES, INFO).with_columns(train={"id": [0, 0, *range(2, N)]})
    assert torch.equal(twice.by_id(train=2), SCORES[2])
    with pytest.raises(ValueError, match="2 examples have the id 0, in the rows 0, 1"):
        twice.by_id(train=0)


TEXTS = [
    '=HYPERLINK("http://x","y")',
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "＝1+1",
    'plain, "quoted"; text',
    "two\nlines",
    "-5",
    "\udcff\x00é",
]
READ = ["'" + text for text in TEXTS[:7]] + TEXTS[7:10] + ["\\udcff\x00é"]


def hostile():
    columns = {"id": TEXTS, "=note": TEXTS, "x": [*range(N - 1), None]}
    return Attribution(SCORES, INFO).with_columns(train=columns)


def test_csv(attribution, tmp_path):
    for _ in range(2):
        attribution.to_csv(tmp_path / "new" / "table.csv", k=3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.csv"]
    with open(tmp_path / "new" / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = list(expected_rows(3))
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            found = float(np.float32(row[name])) if isinstance(value, float) else row[name]
            assert found == (value if isinstance(value, float) else "" if value is None else str(value))


def test_text_in_csv_stays_inert(tmp_path):
    hostile().to_csv(tmp_path / "table.csv", k=N)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert "train_=note" in header  # the prefix makes it inert
    for row in rows:
        found = dict(zip(header, row, strict=True))
        assert found["train_id"] == READ[int(found["train_row"])]
        assert found["train_=note"] == found["train_id"]
        assert found["train_x"] == ("" if found["train_row"] == str(N - 1) else found["train_row"])
        assert float(found["score"]) == SCORES[int(found["train_row"]), int(found["target_row"])]


def test_csv_is_read_by_pandas(tmp_path):
    attribution = Attribution(SCORES, INFO, outputs=OUTPUTS).with_columns(train=TRAIN, targets=TARGETS)
    attribution.to_csv(tmp_path / "table.csv", k=3)
    found, frame = pd.read_csv(tmp_path / "table.csv"), attribution.to_pandas(k=3)
    assert list(found.columns) == list(frame.columns)
    np.testing.assert_allclose(found.score, frame.score, rtol=1e-6)
    assert found.train_id.tolist() == frame.train_id.tolist()


def test_parquet(attribution, tmp_path):
    attribution.to_parquet(tmp_path / "new" / "table.parquet", k=3)
    assert parquet.read_table(tmp_path / "new" / "table.parquet").to_pylist() == list(expected_rows(3))


def test_parquet_takes_any_column(tmp_path):
    mixed = {
        "kinds": [1, "1", None, True, 0.5] + [0] * 6,
        "numbers": [1, 0.5, None] + [0] * 8,
        "large": [2**70] + [0] * 10,
        "flags": [True, None] + [False] * 9,
        "nothing": [None] * 11,
        "ints": [1, None] + [2] * 9,
    }
    hostile().with_columns(train=mixed).to_parquet(tmp_path / "table.parquet", k=N)
    table = parquet.read_table(tmp_path / "table.parquet")
    seen = {row["train_row"]: row for row in table.to_pylist()}
    column = {name: [seen[row][f"train_{name}"] for row in range(5)] for name in mixed}
    assert column["kinds"] == ["1", "1", None, "True", "0.5"]
    assert column["numbers"] == [1.0, 0.5, None, 0.0, 0.0]
    assert column["large"][:2] == [str(2**70), "0"]
    assert column["flags"][:3] == [True, None, False]
    assert column["nothing"] == [None] * 5
    assert column["ints"][:3] == [1, None, 2]
    assert [seen[row]["train_id"] for row in range(N)] == [*TEXTS[:10], "\\udcff\x00é"]


def test_a_table_that_fails_leaves_the_former(tmp_path, monkeypatch):
    attribution = Attribution(SCORES, INFO)
    attribution.to_csv(tmp_path / "table.csv")
    before = (tmp_path / "table.csv").read_bytes()

    def fail(*_):
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="no space"):
            attribution.to_csv(tmp_path / "table.csv", k=1)
    assert (tmp_path / "table.csv").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_package_an_error_says_what_to_install(tmp_path):
    script = """if True:
        import sys
        sys.modules["pandas"] = sys.modules["pyarrow"] = None
        import torch
        from lightning_trak import Attribution
        from lightning_trak.results.info import AttributionInfo
        attribution = Attribution(torch.ones(2, 1), AttributionInfo(2, 1, ("a",), "sparse", 1, 0.3, True))
        attribution.to_csv("table.csv")
        calls = {"pandas": attribution.to_pandas, "pyarrow": lambda: attribution.to_parquet("x.parquet")}
        for package, call in calls.items():
            try:
                call()
            except ModuleNotFoundError as error:
                assert f"pip install {package}" in str(error), error
            else:
                raise AssertionError("no error")"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
