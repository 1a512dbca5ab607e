"""The folder that other tools open, read with csv and Pillow, and as the format ImageFolder it claims to be."""

from __future__ import annotations

import csv
import gc
import json
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from lightning_trak.influence import Findings
from lightning_trak.results.examples import Examples
from lightning_trak.results.suspects import Suspects

N = 6
ORDER = [4, 2, 5, 3, 1, 0]  # those with something wrong, then by loss
GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (N, 9, 12, 3), dtype=np.uint8)
FINDINGS = Findings(
    loss=torch.linspace(0, 1, N),
    self_influence=torch.linspace(1, 2, N),
    mislabelled=torch.arange(N) == 4,
    duplicate_of=torch.tensor([-1, -1, 0, -1, -1, -1]),
    similarity=torch.tensor([-1.0, 0.5, 0.995, 0.5, 0.5, 0.5]),
    leaks=torch.full((N,), -1),
    leak_similarity=torch.zeros(N),
    harmful=torch.zeros(N, dtype=torch.bool),
    harm=None,
)
HOSTILE = ["../../up", "/etc/passwd", "C:\\con", "a\n\"b\",'c'", "\0", "=1+1"]


def suspects(ids=N, **columns):
    return Suspects(FINDINGS, Examples(ids, columns))


def table(folder):
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pixels(folder, file):
    with Pillow.open(folder / file) as image:
        return np.asarray(image)


def test_every_row_has_its_image(tmp_path):
    found = suspects([f"{row}.jpg" for row in range(N)], label=list("abcdef"), prediction=["b"] * N)
    folder = found.export(tmp_path / "new" / "suspects", [(image, 7) for image in PIXELS])
    assert folder == tmp_path / "new" / "suspects"
    rows = table(folder)
    assert list(rows[0])[:7] == ["file_name", "row", "id", "label", "prediction", "loss", "self_influence"]
    assert [int(row["row"]) for row in rows] == ORDER
    for row, place in zip(rows, ORDER, strict=True):
        assert np.array_equal(pixels(folder, row["file_name"]), PIXELS[place])
        assert (row["id"], row["label"], row["prediction"]) == (f"{place}.jpg", "abcdef"[place], "b")
        assert float(row["loss"]) == FINDINGS.loss[place].item()
    assert [row["wrong"] for row in rows[:3]] == [
        "probably mislabelled",
        "near-duplicate of '0.jpg' (cosine 0.995)",
        "",
    ]
    assert files(folder) == sorted(["metadata.csv", *(row["file_name"] for row in rows)])


def test_files_are_named_in_the_order_of_the_suspects(tmp_path):
    """FiftyOne sorts by name."""
    names = [row["file_name"] for row in table(suspects().export(tmp_path / "suspects", PIXELS))]
    assert names == sorted(names)


@pytest.mark.parametrize("form", ["gray", "floats", "alpha", "negative"])
def test_pixels_of_every_form(tmp_path, form):
    gray = PIXELS[:, :, :, 0]
    made, expected = {
        "gray": (gray[:, None], gray),
        "floats": (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255, PIXELS),
        "alpha": (np.concatenate([PIXELS, gray[..., None]], 3), np.concatenate([PIXELS, gray[..., None]], 3)),
        "negative": (
            np.stack([np.linspace(-1, 1, 108).reshape(9, 12)] * N),
            np.stack([np.linspace(0, 255, 108).round().reshape(9, 12)] * N),
        ),
    }[form]
    folder = suspects().export(tmp_path / "suspects", made)
    for row, place in zip(table(folder), ORDER, strict=True):
        assert np.array_equal(pixels(folder, row["file_name"]), expected[place])


def test_classes_of_pixels_are_colours(tmp_path):
    classes = np.zeros((9, 12), int)
    classes[:3] = 1
    folder = suspects()[:1].export(tmp_path / "suspects", [(np.zeros((9, 12), np.uint8), classes)] * N)
    image = pixels(folder, "images/0000000.png").astype(float)
    assert image[3:].max() == 0
    np.testing.assert_allclose(image[:3], np.broadcast_to(0.55 * np.array([0x00, 0x72, 0xB2]), (3, 12, 3)), atol=0.5)


def test_part_of_the_suspects_reads_no_other_example(tmp_path):
    class Counting(list):
        read = ()

        def __getitem__(self, row):
            self.read += (row,)
            return super().__getitem__(row)

    data = Counting(PIXELS)
    folder = suspects().wrong.export(tmp_path / "suspects", data)
    assert data.read == (4, 2)
    assert [row["row"] for row in table(folder)] == ["4", "2"]
    assert len(files(folder)) == 3


def test_labels_of_the_examples_where_no_column_tells_them(tmp_path):
    rows = table(suspects().export(tmp_path / "suspects", [(PIXELS[row], 10 + row) for row in range(N)]))
    assert [row["label"] for row in rows] == [str(10 + place) for place in ORDER]


def test_several_images(tmp_path):
    data = [{"left": PIXELS[row], "image": PIXELS[row] // 2} for row in range(N)]
    pairs = [(PIXELS[row], PIXELS[row] // 3) for row in range(N)]
    named, unnamed = (suspects().export(tmp_path / name, made) for name, made in (("a", data), ("b", pairs)))
    for row, place in zip(table(named), ORDER, strict=True):
        assert np.array_equal(pixels(named, row["file_name"]), PIXELS[place] // 2)
        assert np.array_equal(pixels(named, row["left_file_name"]), PIXELS[place])
    for row, place in zip(table(unnamed), ORDER, strict=True):
        assert np.array_equal(pixels(unnamed, row["file_name"]), PIXELS[place])
        assert np.array_equal(pixels(unnamed, row["image_1_file_name"]), PIXELS[place] // 3)


def test_several_images_of_one_name(tmp_path):
    folder = suspects().export(tmp_path / "suspects", [{"views": tuple(PIXELS)}] * N)
    names = ["file_name", "views_file_name", *(f"views_{number}_file_name" for number in range(2, N))]
    for row in table(folder):
        for name, expected in zip(names, PIXELS, strict=True):
            assert np.array_equal(pixels(folder, row[name]), expected)


def test_what_is_no_image_is_in_the_table(tmp_path):
    data = [
        {"age": row, "job": f"job {row}", "story": f"a story of {row} words", "pulse": torch.arange(70) / 8, "y": 1}
        for row in range(N)
    ]
    folder = suspects().export(tmp_path / "suspects", data)
    for row, place in zip(table(folder), ORDER, strict=True):
        assert (row["age"], row["job"], row["story"]) == (str(place), f"job {place}", f"a story of {place} words")
        assert json.loads(row["pulse"]) == [step / 8 for step in range(70)]
        assert row["label"] == "1"
    assert "file_name" not in table(folder)[0]
    assert [path.name for path in folder.iterdir()] == ["metadata.csv"]


@pytest.mark.parametrize(
    ("example", "column", "value"),
    [
        ("a text of some words", "text", "a text of some words"),
        (("a text of some words", "and yet one more text"), "text_2", "and yet one more text"),
        (["two", "words"], "tokens", "two words"),
        (torch.tensor([5, 6, 7]), "tokens", "5 6 7"),
        (torch.tensor([0.5, 0.25]), "1", "0.25"),
        (torch.tensor([[0.5, 1.0]] * 70), "series", json.dumps([[0.5] * 70, [1.0] * 70])),
        ({"loss": 3.5, "file_name": 1, "my_file_name": "a b c d"}, "loss_2", "3.5"),
    ],
)
def test_names_of_columns(tmp_path, example, column, value):
    (row, *_) = table(suspects().export(tmp_path / "suspects", [example] * N))
    assert row[column] == value
    assert float(row["loss"]) == FINDINGS.loss[4].item()
    assert not [name for name in row if name.endswith("file_name")]


def test_what_cannot_be_shown_is_left_out(tmp_path):
    rows = table(suspects().export(tmp_path / "suspects", [object()] * N))
    assert list(rows[0]) == list(suspects().to_rows()[0])


def test_a_column_of_the_user_is_no_path(tmp_path):
    found = suspects(file_name=HOSTILE, image=HOSTILE, my_file_name=HOSTILE, file_names=HOSTILE)
    rows = table(found.export(tmp_path / "suspects", PIXELS))
    assert [row["file_name"] for row in rows] == [f"images/000000{place}.png" for place in range(N)]
    assert "image" not in rows[0]
    assert rows[0]["file_name_2"] == rows[0]["image_2"] == rows[0]["my_file_name_2"] == rows[0]["file_names_2"] == "\0"


def test_hostile_names_stay_in_the_table(tmp_path):
    """No file is named for an id, a label, or a key of the data."""
    names = {name: f"{row} or more words of it" for row, name in enumerate(HOSTILE)}
    data = [{**names, "../x": PIXELS[row], "/y": PIXELS[row]} for row in range(N)]
    folder = suspects(HOSTILE, label=HOSTILE, prediction=HOSTILE).export(tmp_path / "suspects", data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["suspects"]
    expected = [f"images/000000{place}{end}.png" for place in range(N) for end in ("", "-7")]
    assert sorted(path for path in files(folder)) == sorted(["metadata.csv", *expected])
    rows = table(folder)
    assert [row["id"] for row in rows] == ["\0", "C:\\con", "'=1+1", "a\n\"b\",'c'", "/etc/passwd", "../../up"]
    assert [row["/etc/passwd"] for row in rows] == ["1 or more words of it"] * N


@pytest.mark.parametrize("there", ["file", "other content", "an export", "link", "dangling link"])
def test_nothing_is_overwritten(tmp_path, there):
    path, elsewhere = tmp_path / "suspects", tmp_path / "elsewhere"
    if there == "file":
        path.write_text("mine")
    elif there == "other content":
        (path / "images").mkdir(parents=True)
    elif there == "an export":
        suspects().export(path, PIXELS)
    else:
        if there == "link":
            elsewhere.mkdir()
        path.symlink_to(elsewhere, target_is_directory=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="exists and is no empty folder. Choose another path, or delete it"):
        suspects().export(path, PIXELS)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(tmp_path):
    assert len(table(suspects().export(tmp_path, PIXELS))) == N


def test_a_failure_leaves_nothing(tmp_path):
    class Failing(list):
        def __getitem__(self, row):
            if row == 3:
                raise OSError("the disk of the data is gone")
            return super().__getitem__(row)

    with pytest.raises(OSError, match="of the data is gone"):
        suspects().export(tmp_path / "suspects", Failing(PIXELS))
    assert list(tmp_path.iterdir()) == []


def test_another_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train must have 6 examples"):
        suspects().export(tmp_path / "suspects", PIXELS[:3])
    with pytest.raises(TypeError, match="train must be a sequence of examples"):
        suspects().export(tmp_path / "suspects", iter(PIXELS))
    with pytest.raises(OSError, match="can be read, but not written"):
        suspects().export("s3://bucket/suspects", PIXELS)
    assert list(tmp_path.iterdir()) == []


def test_random_states_stay(tmp_path):
    class Augmented(list):
        def __getitem__(self, row):
            random.random()
            return torch.rand(3, 9, 12)

    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate()
    suspects().export(tmp_path / "suspects", Augmented(range(N)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_no_suspects(tmp_path):
    rows = table(suspects()[:0].export(tmp_path / "suspects", PIXELS))
    assert rows == []


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of datasets
def test_it_is_an_image_folder(tmp_path):
    """As the library whose format it is reads it; Spotlight opens the folder in the same way."""
    data = [{"image": PIXELS[row], "left": PIXELS[row] // 2, "age": row, "label": 1} for row in range(N)]
    folder = suspects(label=list("abcdef")).export(tmp_path / "test", data)
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
    assert found["row"][:] == found["age"][:] == ORDER
    assert found["label"][:] == ["abcdef"[place] for place in ORDER]
    for row, place in zip(found, ORDER, strict=True):
        assert np.array_equal(np.asarray(row["image"]), PIXELS[place])
        assert np.array_equal(np.asarray(row["left"]), PIXELS[place] // 2)
    gc.collect()
