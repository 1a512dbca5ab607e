"""What an example is made of, and its label, in every form that data sets have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from lightning_trak.results.kinds import Image, Series, Table, Text, Tokens, Unknown, described, parts
from lightning_trak.results.numbers import number_text

GRAY, COLOUR = torch.rand(1, 9, 12), np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
CLASSES = torch.randint(0, 5, (9, 12))
CAPTION = "a photo of a cat"


@dataclass
class Graph:
    nodes: int
    name: str


# form: (example, kinds of parts, label)
FORMS = {
    "image": (GRAY, [Image], None),
    "image and class": ((GRAY, 3), [Image], 3),
    "image and tensor": ((GRAY, torch.tensor(3)), [Image], 3),
    "image and a tensor of one": ((GRAY, torch.tensor([3.5])), [Image], 3.5),
    "image and name": ((COLOUR, "golden retriever"), [Image], "golden retriever"),
    "image and tags": ((GRAY, torch.tensor([0.0, 1.0, 0.0, 1.0])), [Image], "1,3"),
    "image without tags": ((GRAY, torch.zeros(4)), [Image], "none"),
    "image and box": ((GRAY, torch.tensor([0.5, 1.25, 2.0])), [Image], "0.500, 1.25, 2.00"),
    "image and caption": ((GRAY, CAPTION), [Image, Text], None),
    "image and tokens": ((GRAY, torch.tensor([4, 5, 6])), [Image, Tokens], None),
    "image, caption and class": ((GRAY, CAPTION, 1), [Image, Text], 1),
    "two images": ((GRAY, COLOUR), [Image, Image], None),
    "image, class and row": ((GRAY, 3, 17), [Image], 3),
    "image and class map": ((GRAY, CLASSES), [Image], None),
    "image and binary mask": ((GRAY, (CLASSES > 2).float()[None]), [Image], None),
    "image of Pillow": ((Pillow.fromarray(COLOUR), 0), [Image], 0),
    "image of a palette": (Pillow.fromarray(COLOUR).convert("P"), [Image], None),
    "mapping with image": ({"image": GRAY, "label": 3}, [Image], 3),
    "mapping with class map": ({"pixel_values": GRAY.expand(3, -1, -1), "labels": CLASSES}, [Image], None),
    "nested": (({"pixel_values": GRAY}, {"boxes": 1}), [Image, Table], None),
    "alone in a tuple": ((GRAY,), [Image], None),
    "text": ("hello", [Text], None),
    "text and class": (("I liked it very much", 1), [Text], 1),
    "text and name": (("I liked it very much", "positive"), [Text], "positive"),
    "two texts": (("I liked it very much", "It was so good to see"), [Text, Text], None),
    "mapping of texts": ({"premise": CAPTION, "hypothesis": "an animal", "label": 0}, [Text, Text], 0),
    "words": (["a", "cat"], [Tokens], None),
    "words and tags": ((["a", "cat"], [0, 1]), [Tokens, Tokens], None),
    "ids of tokens": (torch.tensor([5, 6, 7]), [Tokens], None),
    "tokens of a tokenizer": (
        {"input_ids": torch.tensor([5, 6, 0]), "attention_mask": torch.tensor([1, 1, 0]), "labels": torch.tensor(1)},
        [Tokens],
        1,
    ),
    "language model": ({"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]}, [Tokens], None),
    "row of a table": (torch.rand(10), [Table], None),
    "row and value": ((torch.rand(10), torch.tensor(2.5)), [Table], 2.5),
    "list of numbers": ([1.0, 2.0, 3.0], [Table], None),
    "two numbers": ((0.5, 1.0), [Table], 1.0),
    "a number": (np.float32(0.5), [Table], None),
    "mapping of numbers": ({"age": 37.0, "job": "clerk", "y": True}, [Table], True),
    "dataclass": (Graph(7, "benzene"), [Table], None),
    "series": (torch.rand(100), [Series], None),
    "series of channels": ((torch.rand(24, 7), 0), [Series], 0),
    "series, channels first": (np.ones((12, 60)), [Series], None),
    "half precision": (torch.rand(10).bfloat16(), [Table], None),
    "volume": (torch.rand(1, 8, 8, 8), [Unknown], None),
    "sparse": (torch.eye(9).to_sparse(), [Unknown], None),
    "complex": (torch.ones(9, dtype=torch.complex64), [Unknown], None),
    "bytes": (b"abc", [Unknown], None),
    "an object": (object(), [Unknown], None),
    "nothing": ((), [Unknown], None),
    "nothing but an empty array": (torch.zeros(3, 0), [Unknown], None),
    "an array that is empty": ({"x_cat": torch.zeros(11, 0), "x_cont": torch.rand(11, 1)}, [Series], None),
    "ragged": (([torch.rand(3), torch.rand(4)], 1), [Table, Table], 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    example, kinds, label = FORMS[form]
    found = described(example)
    assert [type(part) for _, part in found.parts] == kinds
    assert found.label == label
    assert type(found.label) is type(label)


def test_none_is_no_part():
    assert described({"image": None, "text": CAPTION}).parts == [("text", Text(CAPTION))]


def test_contents():
    (_, image), (name, text) = described({"image": COLOUR, "caption": CAPTION}).parts
    assert np.array_equal(image.pixels, COLOUR)
    assert (name, text.text) == ("caption", CAPTION)
    assert described(FORMS["image and class map"][0]).image.classes.tolist() == CLASSES.tolist()
    assert described(FORMS["tokens of a tokenizer"][0]).parts[0][1].tokens == ["5", "6"]
    table = described({"age": 37, "job": "clerk", "married": None, "story": "a long text of many words"}).parts
    assert table == [("", Table({"age": 37, "job": "clerk"})), ("story", Text("a long text of many words"))]
    assert described(np.ones((12, 60))).parts[0][1].values.shape == (60, 12)
    assert described(torch.rand(1, 8, 8, 8)).parts[0][1].what == "Tensor of shape (1, 8, 8, 8)"


def test_nothing_of_what_render_returns_is_a_label():
    assert [type(part) for _, part in parts((GRAY, "cat"))] == [Image, Text]


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.7), (-1.0, 1.5), (0.0, 4000.0)])
def test_floats_are_scaled_where_they_do_not_fit(low, high):
    pixels = np.linspace(low, high, 100).reshape(10, 10)
    found = described(pixels).image.pixels
    fits = low >= 0 and high <= 1
    np.testing.assert_allclose(found, pixels if fits else (pixels - low) / (high - low))


def test_pixels_that_are_not_finite_stay_unknown():
    pixels = np.ones((9, 9))
    pixels[2, 3], pixels[4, 4] = np.nan, np.inf
    found = described(pixels).image.pixels
    assert np.isnan(found[2, 3])
    assert np.isnan(found[4, 4])
    assert np.isnan(found).sum() == 2


def test_bytes_of_an_image_are_no_class_map():
    many = np.arange(108, dtype=np.uint8).reshape(9, 12)
    assert [type(part) for _, part in described((COLOUR, many)).parts] == [Image, Image]
    assert [type(part) for _, part in described((COLOUR, many % 3)).parts] == [Image]


def test_an_image_with_a_usual_name_comes_first():
    mask, image = np.zeros((10, 10)), np.ones((9, 9))
    assert described({"depth": mask, "image": image}).image.pixels.shape == (9, 9)
    assert described({"depth": mask, "picture": image}).image.pixels.shape == (10, 10)


def test_numbers_against_rounding():
    """Three digits, or whole: within half of the last digit that is shown."""
    rng = np.random.default_rng(0)
    for value in (rng.choice([-1, 1], 500) * 10 ** rng.uniform(-9, 9, 500)).tolist():
        text = number_text(value, signed=True)
        assert text[0] == ("+" if value > 0 else "−")
        assert float(text.replace("−", "-")) == pytest.approx(value, rel=0.0051)
        assert number_text(value) == text.removeprefix("+")
        assert len(text) <= 9
    assert [number_text(value) for value in (0.9996, 999.4, 999.6, 123456.0, -7)] == [
        "1.00",
        "999",
        "1000",
        "123456",
        "−7",
    ]
