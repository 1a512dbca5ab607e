"""The file, without a browser: what is in it, and that nothing in the data gets out of its place."""

from __future__ import annotations

import base64
import hashlib
import random
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Attribution, GroundTruth, evaluate
from lightning_trak.influence import Extremes, Ranked
from lightning_trak.results.report.page import in_script
from lightning_trak.results.stored_scores import StoredScores
from lightning_trak.store.chunks import Chunks
from tests.results.report.making import Elements, attribution, read

IMAGES = torch.rand(37, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TRAIN = [(image, row % 3) for row, image in enumerate(IMAGES[:30])]
TARGETS = [(image, row % 3) for row, image in enumerate(IMAGES[30:])]
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- <script>",
    "]]>&lt;b&gt;",
    "\u2028\u2029\u202e\x00",
    "half of a pair: \ud800",
    "{{ 7 * 7 }}{% raw %}",
    "'\"`${alert(1)}",
]


def report(path, found=None, *arguments, **options):
    found = attribution() if found is None else found
    return read(found.report(path / "report.html", *arguments, **options))


@pytest.mark.parametrize("k", [1, 4, 30, 100])
def test_ranked_examples_against_sorting(tmp_path, k):
    own = attribution()
    data, _ = report(tmp_path, own, TRAIN, TARGETS, k=k)
    rows, scores = data["train"]["rows"], own.scores.numpy()
    for side, sign in (("helpful", 1), ("harmful", -1)):
        for target in range(7):
            order = [row for row in np.argsort(-sign * scores[:, target]) if sign * scores[row, target] > 0][:k]
            assert [rows[place] for place in data[side]["places"][target]] == order
            np.testing.assert_allclose(data[side]["scores"][target], scores[order, target], rtol=1e-5)
            texts = [f"{score:+#.3g}".replace("-", "−") for score in scores[order, target]]
            assert data[side]["texts"][target] == texts
            errors = [f"{error:#.3g}" for error in own.standard_error.numpy()[order, target]]
            assert data[side]["errors"][target] == errors


def test_no_positive_score_is_harmful_and_no_negative_one_helpful(tmp_path):
    info = attribution(n=4, m=3).info
    scores = torch.tensor([[1.0, -1, 0], [2, -2, 0], [3, -3, 0], [4, -4, 0]])
    data, _ = report(tmp_path, Attribution(scores, info))
    assert [len(row) for row in data["helpful"]["places"]] == [4, 0, 0]
    assert [len(row) for row in data["harmful"]["places"]] == [0, 4, 0]
    assert data["helpful"]["errors"] is None


def test_examples_are_drawn_once_with_their_labels(tmp_path):
    data, _ = report(tmp_path, attribution(), TRAIN, TARGETS, k=3)
    places = {place for side in ("helpful", "harmful") for row in data[side]["places"] for place in row}
    assert places == set(range(len(data["train"]["rows"])))
    assert len(data["drawn"]) == 7 + len(places)
    assert data["targets"]["drawings"] == list(range(7))
    assert sorted(data["train"]["drawings"]) == list(range(7, 7 + len(places)))
    assert data["targets"]["labels"] == [str(row % 3) for row in range(7)]
    assert data["train"]["labels"] == [str(row % 3) for row in data["train"]["rows"]]
    assert data["targets"]["classes"] == [["0", 3], ["1", 2], ["2", 2]]


class Counting:
    """A data set that knows which rows were read, and draws at random."""

    def __init__(self, n):
        self.n, self.read = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        self.read.append(row)
        return torch.rand(8, 8) + random.random() + np.random.rand()


def test_only_what_is_shown_is_read_and_nothing_is_drawn_from_random_states(tmp_path):
    train, targets = Counting(30), Counting(7)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    data, _ = report(tmp_path, attribution(), train, targets, k=1)
    assert sorted(train.read) == sorted(data["train"]["rows"])
    assert len(train.read) < 15
    assert targets.read == list(range(7))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])


def test_columns_come_before_what_examples_say(tmp_path):
    own = attribution().with_columns(
        train={"id": [f"{row}.png" for row in range(30)], "label": ["cat"] * 30, "source": ["web"] * 30},
        targets={
            "label": ["cat", None, "dog", "cat", "cat", "cat", "cat"],
            "prediction": ["cat"] * 7,
            "weight": [0.5] * 7,
        },
    )
    data, _ = report(tmp_path, own, TRAIN, TARGETS)
    assert set(data["train"]["labels"]) == {"cat"}
    assert data["train"]["ids"][0] == f"{data['train']['rows'][0]}.png"
    assert data["train"]["columns"] == [{"name": "source", "values": ["web"] * len(data["train"]["rows"])}]
    assert data["targets"]["labels"][:3] == ["cat", None, "dog"]
    assert data["targets"]["right"] == [1, None, 0, 1, 1, 1, 1]
    assert data["targets"]["columns"] == [{"name": "weight", "values": ["0.500"] * 7}]
    assert data["targets"]["classes"] == [["cat", 5], ["dog", 1]]
    assert (data["targets"]["numbered"], data["train"]["numbered"]) == (True, False)


@pytest.mark.parametrize(
    ("labels", "predictions", "right", "classes"),
    [
        ([1.0, 0.0, 1.0], [1, 1, 1], [1, 0, 1], [["0", 1], ["1", 2]]),
        ([0.5, 1.5, 2.5], [0.5, 1.0, 2.0], [None] * 3, []),
        ([True, False, None], [True, True, True], [1, 0, None], [["no", 1], ["yes", 1]]),
        ([10, 9, 2], [10, 9, 3], [1, 1, 0], [["2", 1], ["9", 1], ["10", 1]]),
        (["b", "a", 3], ["b", "a", 4], [1, 1, 0], [["3", 1], ["a", 1], ["b", 1]]),
        ([None] * 3, [1, 2, 3], [None] * 3, []),
    ],
)
def test_classes_and_wrong_predictions(tmp_path, labels, predictions, right, classes):
    own = attribution(m=3).with_columns(targets={"label": labels, "prediction": predictions})
    data, _ = report(tmp_path, own)
    assert data["targets"]["right"] == right
    assert data["targets"]["classes"] == classes


def test_many_real_numbers_are_no_classes(tmp_path):
    values = [float(row) for row in range(40)]
    own = attribution(m=40).with_columns(targets={"label": values, "prediction": values})
    data, _ = report(tmp_path, own)
    assert data["targets"]["classes"] == []
    assert set(data["targets"]["right"]) == {None}


def test_outputs(tmp_path):
    own = attribution(m=3)
    outputs = torch.tensor([0.123456789, float("inf"), -2.0])
    data, _ = report(tmp_path, Attribution(own.scores, own.info, outputs=outputs))
    assert data["targets"]["outputs"] == [0.123457, None, -2]
    assert data["targets"]["outputTexts"] == ["0.123", "inf", "−2.00"]
    data, _ = report(tmp_path, Attribution(own.scores, own.info))
    assert data["targets"]["outputTexts"] == [None] * 3


def test_extremes(tmp_path):
    own = attribution()
    top, bottom = own.top(4), own.bottom(4)
    kept = Attribution(Extremes(Ranked(*top), Ranked(*bottom)), own.info)
    data, found = report(tmp_path, kept, k=30)
    whole, _ = report(tmp_path, own, k=4)
    assert data["helpful"]["scores"] == whole["helpful"]["scores"]
    assert data["harmful"]["errors"] is None
    assert "Only the highest and lowest scores of each target were kept" in "".join(found.texts)


class Unwanted:
    """Features from which nothing may be computed."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")


def test_scores_on_disk_are_read_and_no_standard_error_is_computed(tmp_path):
    own = attribution()
    chunks = Chunks(tmp_path / "scores", "place", n=30, size=8)
    for start in range(0, 30, 8):
        chunks.write(start, {"scores": own.scores[start : start + 8].numpy()})
    stored = Attribution(StoredScores(chunks, 7), own.info, kept=Unwanted())
    data, _ = report(tmp_path, stored)
    whole, _ = report(tmp_path, own)
    assert data["helpful"]["scores"] == whole["helpful"]["scores"]
    assert data["helpful"]["errors"] is None
    large = Attribution(own.scores, own.info, kept=Unwanted())
    assert report(tmp_path, large)[0]["helpful"]["errors"] is None
    assert "<table>" not in stored._repr_html_()
    errors = own._with(spread=type(own._spread)(StoredScores(chunks, 7), own._spread.sample))
    data, _ = report(tmp_path, errors)
    rows = data["train"]["rows"]
    expected = [f"{own.scores[rows[place], 0]:#.3g}" for place in data["helpful"]["places"][0]]
    assert data["helpful"]["errors"][0] == expected  # the numbers on disk stand for errors here


def test_data_frames_and_tensors(tmp_path):
    frame = pd.DataFrame(
        {"size": np.arange(30.0), "kind": ["a", "b"] * 15, "label": [0, 1] * 15}, index=range(100, 130)
    )
    data, _ = report(tmp_path, attribution(), frame, frame[:7])
    assert data["tables"] == [["size", "kind"]]
    assert data["targets"]["labels"] == ["0", "1"] * 3 + ["0"]
    assert data["helpful"]["marks"][0][0]
    data, _ = report(tmp_path, attribution(), torch.rand(30, 4), TensorDataset(torch.rand(7, 4), torch.arange(7)))
    assert data["tables"] == [["0", "1", "2", "3"]]


def test_marks_are_those_of_target_and_example(tmp_path):
    rows = torch.rand(37, 5)
    data, _ = report(tmp_path, attribution(), rows[:30], rows[30:], k=3)
    place = data["harmful"]["places"][6][2]
    (column, sign), *_ = data["harmful"]["marks"][6][2]
    differences = rows[data["train"]["rows"][place]] - rows[36]
    shown = [*range(30, 37), *data["train"]["rows"]]
    assert column == (differences / rows[shown].std(0, correction=0)).abs().argmax()
    assert sign == differences[column].sign()


SUSPECTS = [
    {"row": 3, "suspicion": 0.75, "what_is_wrong": "probably mislabelled"},
    {"row": 9, "suspicion": 0.5, "what_is_wrong": "near-duplicate", "of": [4, "b.png"]},
]


def test_suspects(tmp_path):
    data, _ = report(tmp_path, attribution(), TRAIN, suspects=SUSPECTS)
    rows = [data["train"]["rows"][place] for place in data["suspects"]["places"]]
    assert (rows, data["suspects"]["count"]) == ([3, 9], 2)
    assert data["suspects"]["columns"] == [
        {"name": "suspicion", "texts": ["0.750", "0.500"], "numbers": [0.75, 0.5]},
        {"name": "what is wrong", "texts": ["probably mislabelled", "near-duplicate"], "numbers": None},
        {"name": "of", "texts": ["", "4, b.png"], "numbers": None},
    ]
    assert [data["train"]["labels"][place] for place in data["suspects"]["places"]] == ["0", "0"]
    assert data["train"]["drawings"][data["suspects"]["places"][1]] is not None


def test_what_is_wrong_comes_first_and_columns_without_values_are_left_out(tmp_path):
    rows = [{"row": 3, "loss": 1.5, "harm": None, "wrong": ""}, {"row": 9, "loss": 0.5, "wrong": ""}]
    data, _ = report(tmp_path, attribution(), suspects=rows)
    assert [column["name"] for column in data["suspects"]["columns"]] == ["wrong", "loss"]


def test_suspects_by_id_by_method_and_by_self_influence(tmp_path):
    own = attribution().with_columns(train={"id": [f"{row}.png" for row in range(30)]})
    found = type("Ranking", (), {"to_rows": lambda self: [{"id": "7.png", "score": 1}]})()
    data, _ = report(tmp_path, own, suspects=found)
    assert [data["train"]["ids"][place] for place in data["suspects"]["places"]] == ["7.png"]
    values = torch.rand(600, generator=torch.Generator().manual_seed(0))
    data, _ = report(tmp_path, attribution(n=600), suspects=values)
    rows = [data["train"]["rows"][place] for place in data["suspects"]["places"]]
    assert rows == np.argsort(-values.numpy())[:500].tolist()
    assert data["suspects"]["count"] == 600
    assert data["suspects"]["columns"][0]["numbers"] == pytest.approx(values[rows].tolist())


@pytest.mark.parametrize(
    ("suspects", "error", "message"),
    [
        (torch.rand(29), ValueError, r"\(30,\).*got \(29,\)"),
        (torch.full((30,), float("nan")), ValueError, "not finite"),
        ([{"row": 30}], ValueError, "the row 30; rows of the train set are 0 to 29"),
        ([{"id": "x"}], ValueError, "No example has the id 'x'"),
        ([{"score": 1}], ValueError, "without 'row' and 'id': it has 'score'"),
        ([3, 9], TypeError, r"to_rows\(\), a sequence of mappings .* got list"),
        ("3", TypeError, "got str"),
    ],
)
def test_suspects_that_are_none(tmp_path, suspects, error, message):
    with pytest.raises(error, match=message):
        report(tmp_path, attribution(), suspects=suspects)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train": TRAIN[:29]}, ValueError, "train must have 30 examples.*got 29"),
        ({"targets": TRAIN}, ValueError, "targets must have 7 examples.*got 30"),
        ({"train": DataLoader(TRAIN)}, TypeError, r"train must be a sequence.*got DataLoader. Pass the data set"),
        ({"targets": iter(TARGETS)}, TypeError, "targets must be a sequence"),
        ({"k": 0}, ValueError, "k must be a positive integer, got 0"),
        ({"k": True}, ValueError, "got True"),
        ({"evaluation": 0.4}, TypeError, r"evaluation must be what evaluate\(.*got float"),
        ({"train": TRAIN, "render": lambda example: None}, TypeError, "render must return"),
    ],
)
def test_wrong_arguments(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        attribution().report(tmp_path / "report.html", **options)
    assert not list(tmp_path.iterdir())


def test_scores_that_are_not_finite(tmp_path):
    own = attribution()
    scores = own.scores.clone()
    scores[3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Attribution(scores, own.info).report(tmp_path / "report.html")


def test_paths(tmp_path):
    path = tmp_path / "deep" / "<img src=x onerror=alert(1)> 'report'.html"
    assert attribution().report(str(path)) == path
    first = path.read_bytes()
    assert attribution().report(path).read_bytes() == first  # replaced, and the same again
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"path must end in \.html"):
        attribution().report(tmp_path / "report")
    with pytest.raises(OSError, match="can be read, but not written"):
        attribution().report("s3://bucket/report.html")


def hostile(text, path, **options):
    """A report in which every text is hostile."""
    own = attribution(m=3).with_columns(
        train={"id": [f"{row}{text}" for row in range(30)], "label": [text] * 30, text: [text] * 30},
        targets={
            "id": [f"{row}{text}" for row in range(3)],
            "label": [text, f"{text}2", text],
            "prediction": ["x"] * 3,
            text: [text] * 3,
        },
    )
    train = [{text: text, "tokens": [text] * 3, "table": {text: 1.0, "name": text}, "label": text}] * 30
    suspects = [{"row": 0, text: text, "score": 1.0}]
    return own.report(path / "report.html", train, train[:3], title=text, suspects=suspects, **options)


def shape_of(found):
    """The elements of a document; of attributes, those that may run or load something."""
    return [
        (tag, sorted(name for name in attributes if name.startswith("on") or name in ("src", "href")))
        for tag, attributes in found.elements
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_where_it_is(tmp_path, text):
    data, found = read(hostile(text, tmp_path))
    _, harmless = read(hostile("harmless", tmp_path))
    assert shape_of(found) == shape_of(harmless)
    assert data["train"]["labels"][0] == text
    assert data["targets"]["columns"][0]["name"] == text
    assert data["drawn"][0][0] == {"name": text, "kind": "text", "text": text}
    assert data["tables"][0][0] == text
    shown = text.encode("utf-8", "replace").decode().replace("\x00", "�")
    assert shown in "".join(found.texts).replace("\x00", "�")  # the title
    assert text not in found.scripts[""]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_notebooks(text):
    own = attribution(m=3).with_columns(
        train={"id": [f"{row}{text}" for row in range(30)]}, targets={"label": [text] * 3, "id": [text] * 3}
    )
    found, harmless = Elements(own._repr_html_()), Elements(attribution(m=3)._repr_html_())
    assert shape_of(found) == shape_of(harmless)
    assert text in "".join(found.texts)


def test_scripts_escape_all_that_could_end_them():
    value = {"a": HOSTILE, "b": [1.5, None, "é漢"]}
    text = in_script(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()
    assert __import__("json").loads(text) == value


def test_the_browser_is_told_to_run_and_load_nothing_else(tmp_path):
    _, found = read(attribution().report(tmp_path / "report.html", TRAIN, TARGETS))
    policy = next(own["content"] for tag, own in found.elements if own.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for name, text in (("script-src", found.scripts[""]), ("style-src", found.scripts["style"])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    for tag, own in found.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert "style" not in own
        assert not any(name.startswith("on") for name in own)
        assert own.get("href", "#").startswith("#")
        assert "src" not in own
    assert [own.get("type") for tag, own in found.elements if tag == "script"].count(None) == 1
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", found.scripts[""] + found.scripts["style"])


def test_notebook_table_against_sorting():
    own = attribution().with_columns(targets={"label": ["cat"] * 7})
    found = Elements(own._repr_html_())
    text = " ".join("".join(found.texts).split())
    order = np.argsort(-own.scores[:, 1].numpy())[:3]
    listed = ", ".join(f"#{row} ({own.scores[row, 1]:+#.3g})" for row in order)
    assert f"#1cat{own.outputs[1]:#.3g}{listed}".replace("-", "−") in text.replace("-", "−")
    assert "2 more targets" in text
    assert "script" not in {tag for tag, _ in found.elements}
    kept = Attribution(Extremes(Ranked(*own.top(4)), Ranked(*own.bottom(4))), own.info, outputs=own.outputs)
    assert listed in "".join(Elements(kept._repr_html_()).texts)
    assert "none" in Attribution(torch.ones(3, 1), attribution(3, 1).info)._repr_html_()


def test_trust(tmp_path):
    own = attribution(runs=2, n_attributed=5, n_params=8, warnings=("The loss differs.",), temperature=1.3)
    masks = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    repeats = torch.stack([masks.float() @ own.scores] * 2, 1) + torch.randn(40, 2, 7)
    measured = evaluate(own, GroundTruth(masks, repeats))
    _, found = read(own.report(tmp_path / "report.html", evaluation=measured))
    text = " ".join(" ".join(found.texts).split())
    assert "7 targets, 30 training examples, 4 checkpoints of 2 runs" in text
    assert "Training runs 2 Scores are averaged over trainings" in text
    assert "Parameters attributed 5 " in text
    assert "Parameters of the model 8" in text
    assert "Temperature 1.30" in text
    assert "The loss differs." in text
    assert "Whether scores predict retraining was not measured" not in text
    assert f"These scores {measured.lds:#.3g}, 95 % interval" in text
    assert f"Noise ceiling {measured.ceiling:#.3g}" in text
    assert f"Real changes are {measured.slope:#.3g} times as large" in text
    agreement = own.convergence().agreement
    assert f"2 checkpoints: {agreement[0]:#.3g}; 4 checkpoints: {agreement[1]:#.3g}." in text
    assert text.count("by cross-validation") == 4


def test_trust_of_one_checkpoint(tmp_path):
    own = attribution()
    one = Attribution(own.scores, replace(own.info, checkpoints=("a",), dampings=(0.3,), damping_rules=("as given",)))
    _, found = read(one.report(tmp_path / "report.html"))
    text = " ".join(" ".join(found.texts).split())
    assert "Scores come from one checkpoint" in text
    assert "Not known: it takes the scores at two checkpoints" in text
    assert "Training runs unknown" in text
    assert "Not measured here." in text
