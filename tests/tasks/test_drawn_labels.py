"""Labels drawn from predictions: the Fisher information of their loss, over all labels, against the Hessian."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from lightning_trak import (
    ClassificationMixin,
    DiffusionMixin,
    LanguageModelingMixin,
    MultilabelMixin,
    RegressionMixin,
    SegmentationMixin,
    TRAKMixin,
)
from lightning_trak.tasks.base import draws_labels, of_drawing_class
from lightning_trak.tasks.draws import draw_classes, draw_signs, draw_tags


class Words(LanguageModelingMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3, 3)

    def forward(self, tokens):
        return self.words(tokens)


class Tagger(MultilabelMixin, nn.Linear): ...


class Summed(Tagger):
    reduction = "sum"


class Segmenter(SegmentationMixin, nn.Conv1d): ...


def words():
    return Words(), torch.tensor([[0, 2, 1]]), list(product(range(3), repeat=2))


def masked_words():
    tokens = torch.tensor([[0, 2, 1]])
    return Words(), (tokens, torch.tensor([[0, 2, -100]])), [(one, -100) for one in range(3)]


def tags():
    return Tagger(2, 3), (torch.randn(1, 2), torch.zeros(1, 3)), list(product((0.0, 1.0), repeat=3))


def summed_tags():
    return Summed(2, 3), (torch.randn(1, 2), torch.zeros(1, 3)), list(product((0.0, 1.0), repeat=3))


def pixels():
    return Segmenter(2, 3, 1), (torch.randn(1, 2, 2), torch.tensor([[0, 2]])), list(product(range(3), repeat=2))


def masked_pixels():
    batch = (torch.randn(1, 2, 2), torch.tensor([[-100, 2]]))
    return Segmenter(2, 3, 1), batch, [(-100, one) for one in range(3)]


def two_classes():
    return Segmenter(2, 1, 1), (torch.randn(1, 2, 2), torch.tensor([[0, 1]])), list(product(range(2), repeat=2))


class Numbers(RegressionMixin, nn.Linear): ...


class Denoiser(DiffusionMixin, nn.Module):
    n_pairs = 2

    def __init__(self):
        super().__init__()
        self.net, self.alphas_cumprod = nn.Linear(2, 2), torch.linspace(0.9, 0.1, 20)

    def predict_noise(self, noisy, steps, batch):
        return self.net(noisy)


def numbers():
    return Numbers(2, 3), (torch.randn(1, 2), torch.randn(1, 3)), torch.tensor(list(product((-1.0, 1.0), repeat=3)))


def noise():
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=4))).reshape(16, 2, 2)
    return Denoiser(), torch.randn(1, 2), signs


TASKS = [words, masked_words, tags, summed_tags, pixels, masked_pixels, two_classes]


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_all_labels_together_give_the_hessian(task):
    """Of the loss of a model whose logits are linear in its parameters: there it is the Gauss–Newton matrix."""
    torch.manual_seed(0)
    module, batch, labels = task()
    module = module.double()
    batch = (
        tuple(part.double() if part.is_floating_point() else part for part in batch)
        if isinstance(batch, tuple)
        else batch
    )
    parameters = tuple(module.parameters())
    names = [name for name, _ in module.named_parameters()]

    def loss(*values):
        def whole(given):
            return module.output_to_loss(module.model_output(given), given).sum()

        return torch.func.functional_call(
            _Calls(module, whole), dict(zip([f"module.{n}" for n in names], values, strict=True)), (batch,)
        )

    blocks = torch.autograd.functional.hessian(loss, parameters)
    sizes = [value.numel() for value in parameters]
    rows = [
        torch.cat([block.reshape(r, c) for block, c in zip(row, sizes, strict=True)], 1)
        for row, r in zip(blocks, sizes, strict=True)
    ]
    hessian = torch.cat(rows)
    total, probabilities = torch.zeros_like(hessian), 0.0
    for drawn in labels:
        drawn = torch.tensor([drawn])
        value = module.drawn_loss((batch, drawn.double() if drawn.is_floating_point() else drawn))
        gradient = flat(torch.autograd.grad(value.sum(), parameters))
        probability = (-value.detach().squeeze() * norm_of(module, drawn)).exp()
        total += probability * torch.outer(gradient, gradient)
        probabilities += probability
    torch.testing.assert_close(probabilities, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(total, hessian)


def norm_of(module, drawn):
    """√N, by which the sum of the parts' losses was divided."""
    if isinstance(module, Summed):
        return 1.0
    return float((drawn != -100).sum()) ** 0.5


class _Calls(nn.Module):
    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, batch):
        return self.function(batch)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_labels_are_drawn_as_often_as_predicted(task):
    torch.manual_seed(0)
    module, batch, labels = task()
    n = 20_000
    many = tuple(part.expand(n, *part.shape[1:]) for part in batch) if isinstance(batch, tuple) else batch.expand(n, -1)
    drawn = module.draw_labels(many, range(n)).reshape(n, -1)
    for one in labels:
        value = module.drawn_loss((batch, torch.tensor([one]))).item()
        expected = torch.tensor(-value * norm_of(module, torch.tensor([one]))).exp().item()
        found = (drawn == torch.tensor(one)).all(1).float().mean().item()
        assert abs(found - expected) < 5 * (expected * (1 - expected) / n) ** 0.5 + 1e-9


class OtherOutput(Words):
    def model_output(self, batch):
        return super().model_output(batch)


class OwnDraws(TRAKMixin):
    def model_output(self, batch): ...
    def draw_labels(self, batch, seeds): ...


class Classifier(ClassificationMixin, nn.Linear): ...


class OwnLoss(Classifier):
    def per_sample_loss(self, batch): ...


def test_which_modules_draw_labels():
    """Not one with an output of its own, which may be another: labels belong to the mixin's."""
    assert all(draws_labels(module) for module in (Words(), Tagger(1, 1), Segmenter(1, 1, 1), OwnDraws()))
    assert draws_labels(Classifier(1, 3))
    assert not any(draws_labels(module) for module in (OtherOutput(), OwnLoss(1, 3), nn.Linear(1, 1)))


class WordsOfAClassifier(LanguageModelingMixin, Classifier): ...


class ClassifierOfWords(ClassificationMixin, Words): ...


class NumbersOfWords(RegressionMixin, Words): ...


class WordsOfNumbers(LanguageModelingMixin, RegressionMixin, nn.Linear): ...


def test_of_two_mixins_the_first_one_draws():
    for module, rest in ((Classifier(1, 3), True), (ClassifierOfWords(), True), (WordsOfAClassifier(1, 3), False)):
        assert of_drawing_class(module, "draws_rest") == rest
        assert of_drawing_class(module, "whitens_by_default")
    assert not any(of_drawing_class(module, "draws_rest") for module in (Words(), OwnDraws(), nn.Linear(1, 1)))
    assert draws_labels(WordsOfAClassifier(1, 3))
    assert not of_drawing_class(NumbersOfWords(), "whitens_by_default")
    assert of_drawing_class(WordsOfNumbers(1, 3), "whitens_by_default")


def set_nothing(module): ...


def set_temperature(module):
    module.temperature = 0.7


def set_weights(module):
    module.class_weights = torch.tensor([1.0, 3.0, 0.5, 2.0])


@pytest.mark.parametrize("setting", [set_nothing, set_temperature, set_weights], ids=lambda setting: setting.__name__)
def test_the_output_and_the_other_classes_together_give_the_hessian(setting):
    """w ∇f ∇fᵀ of the output, and the other classes as often as they are predicted: the chain rule of information."""
    torch.manual_seed(0)
    module, batch = Classifier(3, 4).double(), (torch.randn(1, 3).double(), torch.tensor([2]))
    setting(module)
    parameters = tuple(module.parameters())
    weight = getattr(module, "class_weights", torch.ones(4))[2].item()
    scale = getattr(module, "temperature", 1)

    def loss(matrix, bias):
        logits = nn.functional.linear(batch[0], matrix, bias) / scale
        return weight * nn.functional.cross_entropy(logits, batch[1])

    blocks = torch.autograd.functional.hessian(loss, parameters)
    rows = [
        torch.cat([block.reshape(value.numel(), -1) for block in row], 1)
        for row, value in zip(blocks, parameters, strict=True)
    ]
    hessian = torch.cat(rows)
    total = module.out_to_loss_curvature(batch) * outer(module.model_output(batch), parameters)
    p = (module(batch[0]) / scale).softmax(1)[0]
    for other in (0, 1, 3):
        drawn = module.drawn_loss((batch, torch.tensor([other])))
        total += p[other] / (1 - p[2]) * outer(drawn, parameters)
    torch.testing.assert_close(total, hessian)


def outer(value, parameters):
    gradient = flat(torch.autograd.grad(value.sum(), parameters))
    return torch.outer(gradient, gradient)


def test_other_classes_are_drawn_as_often_as_predicted():
    torch.manual_seed(0)
    module, n = Classifier(3, 4), 20_000
    x, y = torch.randn(1, 3).expand(n, 3), torch.full((n,), 2)
    p = module(x[:1]).softmax(1)[0]
    found = torch.bincount(module.draw_labels((x, y), range(n)), minlength=4) / n
    expected = p.index_fill(0, torch.tensor([2]), 0) / (1 - p[2])
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert found[2] == 0


@pytest.mark.parametrize("outputs", [1, 2])
def test_two_classes_leave_none_to_draw(outputs):
    assert Classifier(3, outputs).draw_labels((torch.randn(4, 3), torch.tensor([0, 1, 1, 0])), range(4)) is None


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_an_example_has_the_same_labels_in_every_batch(task):
    """A shortage of memory, or another engine, changes the batches and must not change the curvature."""
    torch.manual_seed(0)
    module, batch, _ = task()
    parts = batch if isinstance(batch, tuple) else (batch,)
    many = [part.expand(50, *part.shape[1:]) for part in parts]

    def drawn(rows):
        own = [part[rows.start : rows.stop] for part in many]
        return module.draw_labels(tuple(own) if isinstance(batch, tuple) else own[0], rows)

    whole = drawn(range(50))
    assert torch.equal(torch.cat([drawn(range(3)), drawn(range(3, 50))]), whole)
    assert (whole != whole[0]).any()  # each by numbers of its own


@pytest.mark.parametrize("task", [numbers, noise], ids=lambda task: task.__name__)
def test_all_signs_together_give_the_hessian_of_the_squared_error(task):
    """Of predictions that are linear in the parameters: there it is the Gauss–Newton matrix."""
    torch.manual_seed(0)
    module, batch, signs = task()
    parameters = tuple(module.parameters())

    def loss(*values):
        named = dict(zip([f"module.{name}" for name, _ in module.named_parameters()], values, strict=True))
        calls = _Calls(module, lambda given: module.output_to_loss(module.model_output(given), given).sum())
        return torch.func.functional_call(calls, named, (batch,))

    blocks = torch.autograd.functional.hessian(loss, parameters)
    hessian = torch.cat(
        [torch.cat([b.reshape(v.numel(), -1) for b in row], 1) for row, v in zip(blocks, parameters, strict=True)]
    )
    total = sum(outer(module.drawn_loss((batch, one[None])), parameters) for one in signs) / len(signs)
    torch.testing.assert_close(total, hessian, rtol=1e-3, atol=1e-4)
    drawn = module.draw_labels(
        tuple(part.expand(5000, -1) for part in batch) if task is numbers else batch.expand(5000, -1), range(5000)
    )
    assert drawn.shape == (5000, *signs.shape[1:])
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    flat_signs = drawn.flatten(1)
    torch.testing.assert_close(flat_signs.T @ flat_signs / 5000, torch.eye(flat_signs.shape[1]), atol=0.08, rtol=0)


def test_a_single_number_leaves_nothing_to_draw():
    assert Numbers(2, 1).draw_labels((torch.randn(4, 2), torch.randn(4, 1)), range(4)) is None


@pytest.mark.parametrize("draw", [draw_classes, draw_tags])
def test_predictions_that_are_not_finite(draw):
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    with pytest.raises(ValueError, match="predictions of 1 of 3 training examples are not finite"):
        draw(logits, range(3))


def test_signs_of_whole_numbers_and_deterministic_algorithms():
    assert set(draw_signs(range(3), [50], torch.zeros(0, dtype=torch.uint8)).unique().tolist()) == {-1.0, 1.0}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        draw_classes(torch.zeros(2, 3), range(2))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_numbers_that_are_exactly_right_have_no_share():
    """The slope of minus a norm is zero at zero, as in the output."""
    module = Numbers(2, 3)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    share = module.share_of_parts(((torch.randn(1, 2), torch.zeros(1, 3)), torch.ones(1, 3)))
    share.sum().backward()
    assert share == 0
    assert (module.weight.grad == 0).all()
