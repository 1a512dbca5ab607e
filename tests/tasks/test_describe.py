"""What mixins say of targets: the label, and the prediction."""

from __future__ import annotations

import pytest
import torch

import lightning_trak as lt
from lightning_trak.tasks.base import own_method
from lightning_trak.tasks.checks import described_rows

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0], [-1.0, -2.0, -0.5]])


def module(mixin, **attributes):
    """Its forward returns the inputs."""
    kind = type("Model", (mixin, torch.nn.Identity), attributes)
    return kind()


def test_classes():
    model = module(lt.ClassificationMixin)
    said = model.describe((LOGITS, torch.tensor([0, 0, 1])))
    assert said["label"].tolist() == [0, 0, 1]
    assert said["prediction"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_single_logit(shape, dtype):
    said = module(lt.ClassificationMixin).describe(
        (torch.tensor([0.3, -0.2, 5.0, -5.0]).reshape(shape), torch.tensor([0, 0, 1, 1]).to(dtype).reshape(shape))
    )
    assert said["label"].tolist() == [0, 0, 1, 1]
    assert said["prediction"].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("mixin", [lt.ClassificationMixin, lt.RegressionMixin, lt.MultilabelMixin])
def test_targets_without_labels_have_predictions(mixin):
    said = module(mixin).describe(LOGITS)
    assert list(said) == ["prediction"]
    assert len(said["prediction"]) == 3


@pytest.mark.parametrize("mixin", [lt.ClassificationMixin, lt.RegressionMixin, lt.MultilabelMixin])
def test_labels_elsewhere_are_found_by_the_hook(mixin):
    rows = {lt.ClassificationMixin: torch.tensor([2, 1, 0])}.get(mixin, LOGITS.round().clamp(0, 1))
    model = module(mixin, get_labels=lambda self, batch: rows)
    assert "label" in model.describe(LOGITS)


def test_tags():
    said = module(lt.MultilabelMixin).describe((LOGITS, torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]])))
    assert said == {"label": ["0,1", "none", "2"], "prediction": ["0,2", "1", "none"]}


def test_numbers():
    said = module(lt.RegressionMixin).describe((LOGITS[:, :1], torch.tensor([1.0, 2.0, 3.0])))
    assert said["label"].tolist() == [1.0, 2.0, 3.0]
    assert said["prediction"].tolist() == [2.0, 0.0, -1.0]
    said = module(lt.RegressionMixin).describe((LOGITS, LOGITS + 1))
    assert said["label"] == ["3, 0, 1.5", "1, 2, -2", "0, -1, 0.5"]
    assert said["prediction"][1] == "0, 1, -3"


@pytest.mark.parametrize(
    "mixin", [lt.TRAKMixin, lt.SegmentationMixin, lt.LanguageModelingMixin, lt.ContrastiveMixin, lt.DiffusionMixin]
)
def test_other_tasks_say_nothing(mixin):
    assert own_method(module(mixin), "describe") is None


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (torch.zeros(2), r"Model.describe\(batch\) returned Tensor\(2,\); expected a dict"),
        ({"x": "ab"}, "returned str as 'x'; expected a value for each example"),
        ({"x": torch.tensor(1)}, r"returned Tensor\(\) as 'x'"),
        ({"x": [1]}, "returned 1 values as 'x' for a batch of 2 examples"),
    ],
)
def test_what_is_no_description_is_refused(said, match):
    with pytest.raises((TypeError, ValueError), match=match):
        described_rows(module(lt.TRAKMixin), said, 2)
