"""What of each example is put into the file."""

from __future__ import annotations

import base64
import io
import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image as Pillow

from lightning_trak.results.reading import read
from lightning_trak.results.report.drawing import Drawings

mpl.use("Agg")


def drawn(example, **options):
    drawings = Drawings(1, **options)
    drawings.add(example)
    return drawings.drawn[0]


def pixels_of(drawing):
    assert drawing["source"].startswith("data:image/png;base64,")
    with Pillow.open(io.BytesIO(base64.b64decode(drawing["source"].partition(",")[2]))) as image:
        return np.asarray(image)


def test_image():
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    (drawing,) = drawn((image, 3))
    assert np.array_equal(pixels_of(drawing), image)
    assert (drawing["width"], drawing["height"]) == (12, 9)


def test_class_map():
    (drawing,) = drawn((np.ones((9, 9)), np.arange(81).reshape(9, 9) % 15))
    assert drawing["classes"][:2] == [("1", 0), ("2", 1)]
    assert len(drawing["classes"]) == 12
    assert drawing["more"] == 2


@pytest.mark.parametrize(("count", "edge"), [(1, 160), (2000, 115), (30_000, 32)])
def test_the_more_images_the_smaller(count, edge):
    drawings = Drawings(count)
    drawings.add(np.zeros((300, 200)))
    assert drawings.drawn[0][0]["height"] == edge


def test_text_and_tokens_are_cut_and_say_so():
    assert drawn("abc")[0] == {"kind": "text", "text": "abc"}
    (drawing,) = drawn("ab" * 5000)
    assert (len(drawing["text"]), drawing["more"]) == (2000, 8000)
    (drawing,) = drawn(["w" * 1000] * 301)
    assert (len(drawing["tokens"]), len(drawing["tokens"][0]), drawing["more"]) == (300, 201, 1)


def test_names_of_parts():
    drawings = drawn({"premise": "a cat sleeps on it", "hypothesis": "an animal is asleep"})
    assert [drawing["name"] for drawing in drawings] == ["premise", "hypothesis"]
    assert "name" not in drawn({"image": np.ones((9, 9)), "label": 1})[0]  # of a part alone it says nothing


def test_short_series_is_drawn_point_by_point():
    values = np.stack([np.linspace(0, 1, 70), np.linspace(4, 2, 70)], 1)
    values[3, 0] = np.nan
    (drawing,) = drawn(values)
    found = np.array(drawing["channels"], dtype=float).T * 4 / 1000
    np.testing.assert_allclose(found, values, atol=0.0021)
    assert (drawing["low"], drawing["high"], drawing["highText"], drawing["length"]) == (0, 4, "4.00", 70)


def test_long_series_keeps_every_peak():
    values = np.random.default_rng(0).normal(size=10_000)
    values[1234] = 9
    (drawing,) = drawn(values)
    assert len(drawing["channels"][0]) == 200
    assert max(drawing["channels"][0]) == 1000
    order = [np.sort(part) for part in np.array_split(values, 100)]
    unit = (drawing["high"] - drawing["low"]) / 1000
    for part, pair in zip(order, np.array(drawing["channels"][0]).reshape(100, 2), strict=True):
        np.testing.assert_allclose(sorted(pair * unit + drawing["low"]), part[[0, -1]], atol=0.51 * unit)


def test_series_without_numbers():
    (drawing,) = drawn(np.full(80, np.nan))
    assert drawing["channels"] == [[None] * 80]
    assert drawn(np.ones(80))[0]["channels"] == [[0] * 80]
    assert drawn(np.ones((100, 11)))[0]["more"] == 3


def test_tables_share_the_names_of_their_columns():
    drawings = Drawings(3)
    for row in ({"age": 37, "job": "clerk"}, {"age": 12.5, "job": None}, {"height": 1.0}):
        drawings.add(row)
    assert [one[0]["columns"] for one in drawings.drawn] == [0, 1, 2]
    assert list(drawings.tables) == [("age", "job"), ("age",), ("height",)]
    assert drawings.drawn[0][0]["values"] == ["37", "clerk"]
    (drawing,) = drawn({str(number): number for number in range(250)})
    assert (len(drawing["values"]), drawing["more"]) == (200, 50)


def test_marks_against_a_slow_reference():
    rows = np.random.default_rng(0).normal(size=(12, 6)) * 10.0 ** np.arange(6)
    rows[4, 2] = rows[0, 2]
    drawings = Drawings(12)
    for row in rows:
        drawings.add(row)
    spread = [math.sqrt(sum((x - rows[:, j].mean()) ** 2 for x in rows[:, j]) / 12) for j in range(6)]
    for example in range(12):
        sizes = {j: abs(rows[example, j] - rows[0, j]) / spread[j] for j in range(6)}
        largest = sorted(sizes, key=lambda j: -sizes[j])[:3]
        expected = [(j, 1 if rows[example, j] > rows[0, j] else -1) for j in largest if sizes[j] > 0]
        assert drawings.marks(0, example) == expected


def test_marks_of_names_gaps_and_other_tables():
    drawings = Drawings(5)
    for row in (
        {"a": 1.0, "b": "x", "c": 0.0},
        {"a": 1.0, "b": "y", "c": float("nan")},
        {"a": 5.0, "b": "x", "c": 0.0},
        {"d": 1.0},
        "a text that is no table",
    ):
        drawings.add(row)
    assert drawings.marks(0, 1) == [(1, 0), (2, 0)]
    assert drawings.marks(0, 2) == [(0, 1)]
    assert drawings.marks(0, 0) == drawings.marks(0, 3) == drawings.marks(0, 4) == drawings.marks(4, 0) == []


def test_what_cannot_be_drawn_says_so():
    assert drawn(torch.zeros(2, 8, 8, 8)) == [{"kind": "unknown", "text": "Tensor of shape (2, 8, 8, 8)"}]


@pytest.mark.parametrize(
    ("render", "kinds"),
    [
        (lambda example: "<b>bold</b>", ["text"]),
        (lambda example: ["a", "cat"], ["tokens"]),
        (lambda example: {"a": 1, "b": 2}, ["table"]),
        (lambda example: example[0], ["image"]),
        (lambda example: Pillow.new("RGB", (20, 10)), ["image"]),
        (lambda example: (example[0], "cat"), ["image", "text"]),
    ],
)
def test_render(render, kinds):
    drawings = Drawings(1, render)
    place, label = drawings.add((torch.rand(8, 8), 3))
    assert (place, label) == (0, 3)
    assert [drawing["kind"] for drawing in drawings.drawn[0]] == kinds


def test_render_draws_figures_and_closes_them():
    def render(example):
        figure, axis = mpl.pyplot.subplots(figsize=(2, 1))
        axis.plot(example)
        return figure

    drawings, open_before = Drawings(30, render), mpl.pyplot.get_fignums()
    for _ in range(30):  # of more than 20 open figures, matplotlib warns
        drawings.add(np.arange(5.0))
    assert pixels_of(drawings.drawn[29][0]).shape[2] == 4
    assert mpl.pyplot.get_fignums() == open_before


@pytest.mark.parametrize("value", [None, object(), b"abc", torch.zeros(2, 8, 8, 8), ()])
def test_render_of_what_cannot_be_drawn(value):
    with pytest.raises(TypeError, match="render must return text, an image"):
        drawn("text", render=lambda example: value)


def test_rows_of_a_data_frame_keep_the_types_of_their_columns():
    frame = pd.DataFrame({"age": [0.5, 1.5], "label": [3, 4], "job": ["x", "y"]}, index=[7, 8])
    assert read(frame, 1) == {"age": 1.5, "label": 4, "job": "y"}
    assert read(["a", "b"], 1) == "b"
