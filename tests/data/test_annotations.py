"""What data sets tell of their examples without reading them; each data set here raises an error if it is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_trak.data.annotations import Annotations, annotations_of, named


class Unread(Dataset):
    """Fails if an example is read."""

    def __init__(self, n, **attributes):
        self.n = n
        vars(self).update(attributes)

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        raise AssertionError("an example was read")


class Columns:
    """Like a data set of Hugging Face: columns by name, of which images must not be decoded."""

    def __init__(self, columns, features):
        self._columns, self.features = columns, {name: kind for name, kind in features.items() if name in columns}
        self.column_names = list(columns)

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key):
        assert isinstance(key, str), "an example was read"
        assert key != "image", "images were decoded"
        return self._columns[key]


FOLDER = {
    "samples": [("cats/0.png", 0), ("cats/1.png", 0), ("dogs/0.jpeg", 1)],
    "targets": [0, 0, 1],
    "classes": ["cat", "dog"],
    "class_to_idx": {"cat": 0, "dog": 1},
}
FILES = ("cats/0.png", "cats/1.png", "dogs/0.jpeg")
INT, TEXT, IMAGE = SimpleNamespace(dtype="int64"), SimpleNamespace(dtype="string"), SimpleNamespace(dtype="PIL.Image")
NAMED = SimpleNamespace(dtype="int64", names=["bad", "good"])

CASES = {
    "nothing": (Unread(3), (None, None, None)),
    "a list": ([1, 2, 3], (None, None, None)),
    "tensors": (TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1])), (None, (2, 0, 1), None)),
    "bytes": (TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1], dtype=torch.uint8)), (None, (2, 0, 1), None)),
    "one tensor": (TensorDataset(torch.tensor([2, 0, 1])), (None, None, None)),
    "numbers to predict": (TensorDataset(torch.zeros(3, 2), torch.zeros(3)), (None, None, None)),
    "masks": (TensorDataset(torch.zeros(3, 2), torch.zeros(3, 4, dtype=torch.int64)), (None, None, None)),
    "a folder of images": (Unread(3, **FOLDER), (FILES, ("cat", "cat", "dog"), ("cat", "dog"))),
    "paths": (Unread(2, imgs=[(Path("a/0.png"), 0), (Path("a/1.png"), 5)]), (("a/0.png", "a/1.png"), (0, 5), None)),
    "of another length": (Unread(2, **FOLDER), (None, None, ("cat", "dog"))),
    "texts are no ids": (Unread(2, samples=[("A good film.", 1), ("Bad", 0)]), (None, (1, 0), None)),
    "samples of three": (Unread(1, samples=[("a.png", 1, 2)]), (None, None, None)),
    "a tensor of targets": (
        Unread(2, targets=torch.tensor([1, 0]), classes=["0 - zero", "1 - one"]),
        (None, ("1 - one", "0 - zero"), ("0 - zero", "1 - one")),
    ),
    "some without labels": (
        Unread(2, labels=np.array([1, -1], dtype=np.int8), classes=("a", "b")),
        (None, ("b", None), ("a", "b")),
    ),
    "several names of a class": (
        Unread(1, targets=[0], classes=[("tench", "Tinca tinca"), ("goldfish",)]),
        (None, ("tench, Tinca tinca",), ("tench, Tinca tinca", "goldfish")),
    ),
    "numbers without a name": (Unread(2, targets=[1, 2], classes=["a", "b"]), (None, (1, 2), ("a", "b"))),
    "numbers that examples do not have": (
        Unread(2, targets=[1, 0], classes=["a", "b"], target_transform=lambda label: 1 - label),
        (None, ("b", "a"), None),
    ),
    "masks by path": (Unread(2, targets=["a.png", "b.png"]), (None, None, None)),
    "boxes": (Unread(2, targets=[[0, 1], [2, 3]]), (None, None, None)),
    "text as labels": (Unread(2, labels=["pos", "neg"]), (None, ("pos", "neg"), None)),
    "numbers as targets": (Unread(2, targets=np.array([0.5, 2.0])), (None, (0.5, 2.0), None)),
    "columns": (
        Columns({"image": [0, 0], "idx": [7, 9], "label": [1, 0]}, {"image": IMAGE, "idx": INT, "label": NAMED}),
        ((7, 9), ("good", "bad"), ("bad", "good")),
    ),
    "columns without labels": (
        Columns({"id": ["a", "b"], "label": [-1, -1]}, {"id": TEXT, "label": NAMED}),
        (("a", "b"), None, ("bad", "good")),
    ),
    "columns of tensors": (
        Columns({"guid": torch.tensor([3, 4]), "labels": torch.tensor([1, 1])}, {"guid": INT, "labels": INT}),
        ((3, 4), (1, 1), None),
    ),
    "columns of images by the name of a path": (Columns({"x": [0], "path": None}, {"x": INT, "path": IMAGE}), None),
}


@pytest.mark.parametrize("case", CASES)
def test_data_sets(case):
    dataset, expected = CASES[case]
    assert annotations_of(dataset) == Annotations(*(expected or ()))


def test_parts_of_data_sets():
    folder = Unread(3, **FOLDER)
    ids, labels, classes = annotations_of(Subset(Subset(folder, [2, 1]), torch.tensor([1, 0, 0])))
    assert (ids, labels) == (("cats/1.png", "dogs/0.jpeg", "dogs/0.jpeg"), ("cat", "dog", "dog"))
    assert classes == ("cat", "dog")
    assert annotations_of(Subset(folder, np.array([-1]))).ids == ("dogs/0.jpeg",)
    assert annotations_of(Subset(Unread(3), [1])) == Annotations()


def test_data_sets_that_are_joined():
    one, other = Unread(3, **FOLDER), Unread(1, **{**FOLDER, "samples": [("birds/0.png", 0)], "targets": [0]})
    assert annotations_of(ConcatDataset([one, other])).ids == (*FILES, "birds/0.png")
    other.classes = ["bird", "dog"]
    joined = annotations_of(ConcatDataset([one, other]))
    assert joined.labels == ("cat", "cat", "dog", "bird")
    assert joined.classes is None
    assert annotations_of(ConcatDataset([one, Unread(2)])) == Annotations()


def test_properties_are_not_called():
    class Lazy(Unread):
        @property
        def targets(self):
            return [self[row] for row in range(len(self))]

        labels = samples = features = targets

    assert annotations_of(Lazy(3)) == Annotations()


def test_names_of_classes():
    assert named((1, 0), ("a", "b")) == ("b", "a")
    assert named((True, 0), ("a", "b")) == (True, 0)
    assert named((0.0, 1.0), ("a", "b")) == (0.0, 1.0)
    assert named((-2, 1), ("a", "b")) == (-2, 1)


def test_a_data_set_of_hugging_face():
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "pixels": datasets.Sequence(datasets.Value("float32")),
        }
    )
    rows = {"id": ["a", "b", "c"], "label": [1, 0, 1], "pixels": [[0.0], [1.0], [2.0]]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    expected = Annotations(("a", "b", "c"), ("good", "bad", "good"), ("bad", "good"))
    assert annotations_of(dataset) == expected
    assert annotations_of(dataset.with_format("torch")) == expected
    assert annotations_of(dataset.with_transform(lambda _: pytest.fail("an example was read"))) == expected
    assert annotations_of(dataset.select([2, 0])).ids == ("c", "a")
    assert annotations_of(Subset(dataset.shuffle(seed=0), [0])).ids[0] in "abc"
    assert annotations_of(dataset.remove_columns(["id", "label"])) == Annotations()
