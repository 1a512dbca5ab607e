"""Mixins: L, Q and w of every task against autograd of the loss that it really trains on, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_trak import (
    ClassificationMixin,
    ContrastiveMixin,
    DiffusionMixin,
    LanguageModelingMixin,
    MultilabelMixin,
    RegressionMixin,
    SegmentationMixin,
    TRAKMixin,
    log_odds,
)


def with_net(mixin, net, **attributes):
    """A module of that mixin, in float64."""

    class Model(mixin, nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net.double()
            vars(self).update(attributes)

        def forward(self, x):
            return self.net(x)

    return Model()


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def classes(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


TAGS = classes(2, 6, 5)
PIXELS = classes(4, 3, 5, 5)
TOKENS = classes(7, 3, 6)
HALF_PIXELS = torch.where((torch.arange(5) % 2 == 0)[:, None], PIXELS, -100)  # as many in each image
CASES = {
    "classes": (
        with_net(ClassificationMixin, nn.Linear(4, 3)), (numbers(6, 4), classes(3, 6)),
        lambda g, y: F.cross_entropy(g, y),
    ),
    "one logit": (
        with_net(ClassificationMixin, nn.Linear(4, 1)), (numbers(6, 4), classes(2, 6)[:, None].double()),
        lambda g, y: F.binary_cross_entropy_with_logits(g, y),
    ),
    "one logit, flat": (
        with_net(ClassificationMixin, nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))), (numbers(6, 4), classes(2, 6)),
        lambda g, y: F.binary_cross_entropy_with_logits(g, y.double()),
    ),
    "smoothed": (
        with_net(ClassificationMixin, nn.Linear(4, 2), label_smoothing=0.2), (numbers(6, 4), classes(2, 6)),
        lambda g, y: F.cross_entropy(g, y, label_smoothing=0.2),
    ),
    "class weights": (
        with_net(ClassificationMixin, nn.Linear(4, 3), class_weights=[1.0, 2.0, 0.5]), (numbers(6, 4), classes(3, 6)),
        lambda g, y: F.cross_entropy(g, y, weight=torch.tensor([1.0, 2.0, 0.5]).double(), reduction="sum") / len(g),
    ),
    "regression": (
        with_net(RegressionMixin, nn.Linear(4, 1)), (numbers(6, 4), numbers(6, 1)), F.mse_loss,
    ),
    "several numbers": (
        with_net(RegressionMixin, nn.Linear(4, 3)), (numbers(6, 4), numbers(6, 3)), F.mse_loss,
    ),
    "tags": (
        with_net(MultilabelMixin, nn.Linear(4, 5)), (numbers(6, 4), TAGS),
        lambda g, y: F.binary_cross_entropy_with_logits(g, y.double()),
    ),
    "tags, summed": (
        with_net(MultilabelMixin, nn.Linear(4, 5), reduction="sum"), (numbers(6, 4), TAGS.bool()),
        lambda g, y: F.binary_cross_entropy_with_logits(g, y.double(), reduction="sum") / len(g),
    ),
    "pixels": (
        with_net(SegmentationMixin, nn.Conv2d(2, 4, 3, padding=1)), (numbers(3, 2, 5, 5), PIXELS), F.cross_entropy,
    ),
    "some pixels": (
        with_net(SegmentationMixin, nn.Conv2d(2, 4, 3, padding=1)), (numbers(3, 2, 5, 5), HALF_PIXELS),
        F.cross_entropy,
    ),
    "tokens": (
        with_net(LanguageModelingMixin, nn.Embedding(7, 7)), (TOKENS, TOKENS),
        lambda g, y: F.cross_entropy(g[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    ),
    "tokens after a prompt": (
        with_net(LanguageModelingMixin, nn.Embedding(7, 7)), (TOKENS, TOKENS.masked_fill(torch.arange(6) < 3, -100)),
        lambda g, y: F.cross_entropy(g[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    ),
}  # fmt: skip


def flat_gradient(value, model, **options):
    return torch.cat(
        [gradient.flatten() for gradient in torch.autograd.grad(value, list(model.parameters()), **options)]
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_its_gradient_are_those_of_training(case):
    """The mean of L is the training loss, and −Q ∇f its per-sample gradient."""
    model, batch, training_loss = CASES[case]
    output = model.model_output(batch)
    assert output.shape == (len(batch[0]),)
    loss = training_loss(model(batch[0]), batch[1])
    torch.testing.assert_close(model.output_to_loss(output, batch).mean(), loss)
    loss_grad = model.out_to_loss_grad(batch)
    expected = -flat_gradient((loss_grad * output).mean(), model)
    torch.testing.assert_close(expected, flat_gradient(training_loss(model(batch[0]), batch[1]), model))
    for row in range(len(output)):  # and so for every example by itself
        one = (batch[0][row : row + 1], batch[1][row : row + 1])
        torch.testing.assert_close(model.model_output(one)[0], output[row])
        gradient = flat_gradient(training_loss(model(one[0]), one[1]), model)
        torch.testing.assert_close(-loss_grad[row] * flat_gradient(model.model_output(one)[0], model), gradient)


UNEVEN_PIXELS = torch.where(torch.arange(75).reshape(3, 5, 5) < 40, PIXELS, -100)  # all, some, none
UNEVEN_TOKENS = TOKENS.masked_fill(torch.arange(6) < torch.tensor([[1], [3], [5]]), -100)


@pytest.mark.parametrize(
    ("model", "batch", "loss"),
    [
        (
            CASES["class weights"][0], CASES["class weights"][1],
            lambda g, y: F.cross_entropy(g, y, weight=torch.tensor([1.0, 2.0, 0.5]).double()),
        ),
        (CASES["pixels"][0], (numbers(3, 2, 5, 5), UNEVEN_PIXELS), F.cross_entropy),
        (
            CASES["tokens"][0], (TOKENS, UNEVEN_TOKENS),
            lambda g, y: F.cross_entropy(g[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
        ),
        (CASES["tags"][0], CASES["tags"][1], lambda g, y: F.binary_cross_entropy_with_logits(g, y.double())),
    ],
)  # fmt: skip
def test_losses_are_reduced_as_in_training(model, batch, loss):
    losses = model.output_to_loss(model.model_output(batch), batch)
    torch.testing.assert_close(model.reduce_losses(losses, batch), loss(model(batch[0]), batch[1]))


@pytest.mark.parametrize("case", CASES)
def test_curvature_is_the_second_derivative_of_the_loss(case):
    """By finite differences of L in f."""
    model, batch, _ = CASES[case]
    output, step = model.model_output(batch).detach(), 1e-4
    losses = [model.output_to_loss(output + shift, batch) for shift in (-step, 0, step)]
    second = (losses[0] - 2 * losses[1] + losses[2]) / step**2
    torch.testing.assert_close(model.out_to_loss_curvature(batch), second, rtol=1e-4, atol=1e-6)


def test_targets_without_labels_are_those_of_the_predicted_class():
    for case in ("classes", "one logit"):
        model, (x, _), _ = CASES[case]
        logits = model(x)
        predicted = logits.argmax(1) if case == "classes" else (logits > 0).long()
        expected = model.model_output((x, predicted))
        for batch in (x, (x,), [x], {"x": x}):
            torch.testing.assert_close(model.model_output(batch), expected)
            with pytest.raises(TypeError, match="expected .inputs, labels.*get_labels"):
                model.out_to_loss_grad(batch)
        assert (expected > (-2 if case == "classes" else 0)).all()


def test_label_smoothing_over_many_classes_is_refused():
    model = with_net(ClassificationMixin, nn.Linear(4, 3), label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing=0.1 with 3 classes"):
        model.model_output((numbers(6, 4), classes(3, 6)))


class HuggingFaceLike(LanguageModelingMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Embedding(7, 7).double()

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.net(input_ids), loss=None)


def test_language_model_batches():
    model = HuggingFaceLike()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    labels = TOKENS.masked_fill(mask == 0, -100)
    whole = model.model_output({"input_ids": TOKENS, "attention_mask": mask, "labels": labels})
    torch.testing.assert_close(model.model_output({"input_ids": TOKENS, "attention_mask": mask}), whole)
    for row, length in enumerate((6, 3, 4)):  # padding changes nothing
        alone = model.model_output({"input_ids": TOKENS[row : row + 1, :length]})
        torch.testing.assert_close(alone, whole[row : row + 1])
    span = torch.arange(6).expand(3, 6) >= 4
    batch = {"input_ids": TOKENS, "output_mask": span}
    losses = F.cross_entropy(model.net(TOKENS)[:, 3:5].transpose(1, 2), TOKENS[:, 4:], reduction="none").mean(1)
    torch.testing.assert_close(F.softplus(-model.model_output(batch)), losses)


def test_segmentation_models_that_return_a_mapping():
    model, batch, _ = CASES["pixels"]

    class Mapped(SegmentationMixin, nn.Module):
        def forward(self, x):
            return {"out": model(x), "aux": None}

    torch.testing.assert_close(Mapped().model_output(batch), model.model_output(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_from_the_smallest_losses_to_the_largest(dtype):
    loss = torch.tensor([1e-30, 1e-9, 1e-3, 0.5, 10.0, 1e3], dtype=dtype)
    torch.testing.assert_close(F.softplus(-log_odds(loss), threshold=100), loss)
    assert torch.isfinite(log_odds(torch.zeros(1, dtype=dtype))).all()
    assert torch.isnan(log_odds(torch.full((1,), -0.5, dtype=dtype))).all()  # and so found out, not taken for zero


def test_an_output_made_from_any_loss():
    """Of an autoencoder: −Q ∇f is the gradient of its loss."""

    class Autoencoder(TRAKMixin, nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4)).double()

        def losses(self, x):
            return (self.net(x) - x).square().mean(1)

        def model_output(self, x):
            return log_odds(self.losses(x))

    model, x = Autoencoder(), numbers(6, 4)
    output = model.model_output(x)
    torch.testing.assert_close(model.output_to_loss(output, x), model.losses(x))
    expected = -flat_gradient((model.out_to_loss_grad(x) * output).mean(), model)
    torch.testing.assert_close(expected, flat_gradient(model.losses(x).mean(), model))


@pytest.mark.parametrize(
    ("mixin", "net", "batch", "message"),
    [
        (MultilabelMixin, nn.Linear(4, 5), (numbers(6, 4), classes(5, 6)), r"\(6, 5\), get_labels \(6,\)"),
        (SegmentationMixin, nn.Linear(4, 5), (numbers(6, 4), classes(5, 6)), r"\(6, 5\), get_labels \(6,\)"),
        (LanguageModelingMixin, nn.Linear(4, 5), (numbers(6, 4), classes(5, 6)), r"\(6, 5\), get_labels \(6,\)"),
        (RegressionMixin, nn.Conv2d(2, 4, 3), (numbers(3, 2, 5, 5), numbers(3)), r"get_predictions returned shape"),
    ],
)
def test_shapes_that_do_not_fit_name_the_hook(mixin, net, batch, message):
    with pytest.raises(ValueError, match=message):
        with_net(mixin, net).model_output(batch)


@dataclass
class Example:
    x: torch.Tensor
    y: torch.Tensor


class Clip(ContrastiveMixin, nn.Module):
    def __init__(self, result):
        super().__init__()
        self._result = result

    def forward(self, **inputs):
        return self._result


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: with_net(ClassificationMixin, nn.Linear(4, 3)).model_output({"image": numbers(6, 4), "y": TAGS}),
            TypeError,
            r"forward cannot be called with 'image', 'y' of the batch, dict\(image: .*Override get_logits",
        ),
        (
            lambda: with_net(ClassificationMixin, nn.Linear(4, 3)).model_output((numbers(6, 4), classes(9, 6) + 3)),
            ValueError,
            "get_labels returned labels outside of 0 to 2",
        ),
        (
            lambda: with_net(SegmentationMixin, nn.Conv2d(2, 4, 1)).model_output((numbers(3, 2, 5, 5), PIXELS + 250)),
            ValueError,
            "classes outside of 0 to 3.* Set ignore_index, which is -100",
        ),
        (
            lambda: with_net(
                ClassificationMixin, nn.Linear(4, 2), label_smoothing=0.1, class_weights=torch.ones(2)
            ).out_to_loss_grad((numbers(6, 4), classes(2, 6))),
            ValueError,
            "class_weights and label_smoothing together.* per_sample_loss",
        ),
        (
            lambda: with_net(RegressionMixin, nn.Linear(4, 1)).model_output((numbers(6, 4), numbers(6, 3))),
            ValueError,
            r"get_labels returned shape \(6, 3\) for one prediction an example. Override get_labels",
        ),
        (
            lambda: with_net(LanguageModelingMixin, nn.Embedding(7, 7)).get_labels({"text": ["a"]}),
            TypeError,
            "Override get_labels",
        ),
        (
            lambda: with_net(
                LanguageModelingMixin, nn.Embedding(7, 7), get_output_mask=lambda batch: torch.ones(3, 5)
            ).model_output(TOKENS),
            ValueError,
            r"get_output_mask returned shape \(3, 5\) for tokens \(3, 6\)",
        ),
        (
            lambda: with_net(MultilabelMixin, nn.Linear(4, 5)).model_output((numbers(6, 4), TAGS - 1)),
            ValueError,
            "labels outside of 0 to 1.*Override get_labels.* If -1 stands for labels that are not known",
        ),
        (
            lambda: with_net(SegmentationMixin, nn.Conv2d(2, 4, 1)).model_output((numbers(3, 2, 5, 5), PIXELS / 3)),
            ValueError,
            "classes that are no whole numbers.*Override get_labels",
        ),
        (
            lambda: with_net(LanguageModelingMixin, nn.Embedding(7, 7)).model_output((TOKENS, TOKENS + 3)),
            ValueError,
            "tokens outside of 0 to 6.* Set ignore_index, which is -100",
        ),
        (
            lambda: with_net(LanguageModelingMixin, nn.Embedding(7, 7)).model_output((TOKENS, TOKENS.double())),
            ValueError,
            "get_labels returned torch.float64; expected tokens, integers. Override get_labels",
        ),
        (
            lambda: with_net(RegressionMixin, nn.Linear(4, 1), get_labels=lambda batch: numbers(1)).output_to_loss(
                numbers(6), {"x": numbers(6, 4)}
            ),
            ValueError,
            r"get_labels returned shape \(1,\) for predictions \(6,\). Override get_labels",
        ),
        (
            lambda: with_net(ClassificationMixin, nn.Linear(4, 3), class_weights=[1.0, 2.0]).output_to_loss(
                numbers(6), (numbers(6, 4), torch.full((6,), 2))
            ),
            ValueError,
            r"class_weights has shape \(2,\), too few for the labels.* one weight for each class",
        ),
        (
            lambda: with_net(ClassificationMixin, nn.Linear(4, 3)).model_output(Example(numbers(6, 4), classes(3, 6))),
            TypeError,
            r"The batch is Example\(x: Tensor\(6, 4\), y: Tensor\(6,\)\).* Override get_logits",
        ),
        (lambda: Clip((1, 2)).get_embeddings({"a": 1}), TypeError, r"forward returned .* Override get_embeddings"),
        (lambda: Clip(None).get_logit_scale(), TypeError, "no parameter logit_scale. Override get_logit_scale"),
        (lambda: DiffusionMixin().model_output(["a"]), TypeError, "Override get_clean"),
        (lambda: DiffusionMixin().model_output(numbers(2, 3)), TypeError, "no tensor alphas_cumprod"),
    ],
)
def test_what_is_wrong_names_the_hook(call, error, message):
    with pytest.raises(error, match=message):
        call()


def broken(inputs):
    raise {"value": ValueError("too hot"), "type": TypeError("can't multiply"), "key": KeyError("layer")}[inputs]


def with_forward(mixin, forward, hook=None):
    class Model(mixin, nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3).double()

    Model.forward = forward
    return Model()


def inner(x, mask):
    return x * mask


FORWARDS = {
    "an argument too many, within": (lambda self, **kw: self.net(**kw), "unexpected keyword argument 'x'"),
    "an argument missing, within": (
        lambda self, **kw: inner(kw["x"]),
        "missing 1 required positional argument: 'mask'",
    ),
    "a key of the labels": (lambda self, **kw: (self.net(kw["x"]), kw["labels"]), "KeyError: 'labels'"),
    "several inputs": (lambda self, x, mask: x, "missing a required argument: 'mask'"),
    "several of any number": (lambda self, *args: args[1], "IndexError: tuple index out of range"),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_a_forward_of_any_arguments_that_takes_others(case):
    forward, message = FORWARDS[case]
    x = numbers(6, 4)
    batch = (x, classes(3, 6)) if "several" in case else {"x": x, "labels": classes(3, 6)}
    for mixin, hook in ((ClassificationMixin, "get_logits"), (RegressionMixin, "get_predictions")):
        with pytest.raises(TypeError, match=rf"Model.forward cannot be called with .*{message}. Override {hook}\("):
            with_forward(mixin, forward).model_output(batch)


def test_unpacking_of_arguments_that_are_not_there():
    def forward(self, *args):
        x, _ = args
        return x

    with pytest.raises(TypeError, match=r"not enough values to unpack \(expected 2, got 1\). Override get_logits"):
        with_forward(ClassificationMixin, forward).model_output((numbers(6, 4), classes(3, 6)))


@pytest.mark.parametrize("kind", ["value", "type", "key"])
def test_other_errors_of_forward_are_not_hidden(kind):
    with pytest.raises(Exception, match="too hot|can't multiply|layer") as raised:
        with_forward(ClassificationMixin, lambda self, **kw: broken(kind)).model_output({"x": numbers(6, 4)})
    assert "Override" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_labels_may_be_integers_of_any_kind(dtype):
    two = with_net(ClassificationMixin, nn.Linear(4, 2))
    batch = numbers(6, 4), classes(2, 6)
    assert torch.equal(two.model_output((batch[0], batch[1].to(dtype))), two.model_output(batch))
    words = with_net(LanguageModelingMixin, nn.Embedding(2, 2))
    tokens = classes(2, 3, 6)
    assert torch.equal(words.model_output((tokens, tokens.to(dtype))), words.model_output((tokens, tokens)))


def test_labels_within_vmap_are_not_known_and_wrong_ones_end_in_nan():
    model = with_net(MultilabelMixin, nn.Linear(4, 5))
    x, y = numbers(6, 4), TAGS.clone()
    y[2, 1] = -1
    found = torch.vmap(lambda x, y: model.model_output((x[None], y[None]))[0])(x, y)
    assert found.isnan().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(
    ("mixin", "net", "batch"),
    [
        (ClassificationMixin, nn.Linear(4, 3), (numbers(6, 4), classes(3, 6))),
        (SegmentationMixin, nn.Conv2d(2, 4, 1), (numbers(3, 2, 5, 5), PIXELS)),
        (LanguageModelingMixin, nn.Embedding(7, 7), (TOKENS, TOKENS)),
    ],
)
def test_running_out_of_memory_is_no_matter_of_labels(monkeypatch, mixin, net, batch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    for place in ("torch.Tensor.scatter", "lightning_trak.tasks.parts.cross_entropy"):
        monkeypatch.setattr(place, full)
    with pytest.raises(torch.OutOfMemoryError):
        with_net(mixin, net).model_output(batch)


def test_inputs_of_a_batch_may_be_a_mapping():
    model = with_net(ClassificationMixin, nn.Linear(4, 3))
    x, y = numbers(6, 4), classes(3, 6)
    torch.testing.assert_close(model.model_output(({"x": x}, y)), model.model_output((x, y)))


@pytest.mark.parametrize("name", ["class_weights", "temperature"])
def test_a_module_may_register_its_own(name):
    class Own(ClassificationMixin, nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)
            self.register_buffer(name, torch.full((3,) if name == "class_weights" else (), 2.0))

        def forward(self, x):
            return self.net(x)

    model, batch = Own(), (numbers(6, 4).float(), classes(3, 6))
    logits = model(batch[0]) / (2 if name == "temperature" else 1)
    losses = F.cross_entropy(logits, batch[1], reduction="none") * (2 if name == "class_weights" else 1)
    torch.testing.assert_close(model.output_to_loss(model.model_output(batch), batch), losses)


@pytest.mark.parametrize("labels", [classes(2, 75).reshape(3, 5, 5), classes(2, 75).reshape(3, 1, 5, 5)])
def test_pixels_of_one_logit(labels):
    model, x = with_net(SegmentationMixin, nn.Conv2d(2, 1, 1)), numbers(3, 2, 5, 5)
    loss = F.binary_cross_entropy_with_logits(model(x).squeeze(1), labels.reshape(3, 5, 5).double())
    batch = x, labels
    torch.testing.assert_close(model.output_to_loss(model.model_output(batch), batch).mean(), loss)
    model.out_to_loss_grad(batch)
    assert (model.kernel_weight(model.model_output(batch).detach(), batch) > 0).all()


class Denoiser(DiffusionMixin, nn.Module):
    n_pairs = 4

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 5).double()
        self.alphas_cumprod = torch.linspace(0.99, 0.01, 40).double()

    def predict_noise(self, noisy, steps, batch):
        return self.net(noisy) * (1 + steps[:, None])


def test_diffusion_is_the_squared_error_of_the_noise():
    """Against a loop over examples and pairs; and its Q against autograd of the loss."""
    model, x = Denoiser(), numbers(6, 5)
    generator = torch.Generator().manual_seed(0)
    noises = torch.stack([torch.randn(5, generator=generator, dtype=torch.float32) for _ in range(4)])
    losses = []
    for row in x:
        errors = []
        for step, noise in zip((5, 15, 25, 35), noises.double(), strict=True):
            share = model.alphas_cumprod[step]
            predicted = model.net(share.sqrt() * row + (1 - share).sqrt() * noise) * (1 + step)
            errors.append((predicted - noise).square().mean())
        losses.append(torch.stack(errors).mean())
    losses = torch.stack(losses)
    output = model.model_output(x)
    torch.testing.assert_close(output, -losses.sqrt())
    torch.testing.assert_close(model.output_to_loss(output, x), losses)
    torch.testing.assert_close(model.model_output(x[2:3]), output[2:3])
    expected = -flat_gradient((model.out_to_loss_grad(x) * output).mean(), model)
    torch.testing.assert_close(expected, flat_gradient(losses.mean(), model))
    torch.testing.assert_close(model.out_to_loss_curvature(x), torch.full((6,), 2.0).double())
    torch.testing.assert_close(model.kernel_weight(output.detach(), x), torch.full((6,), 10.0).double())


def test_predicted_noise_of_another_shape():
    model = Denoiser()
    model.net = nn.Linear(5, 10).double()
    with pytest.raises(ValueError, match="Return the predicted noise alone, without a predicted variance"):
        model.model_output(numbers(2, 5))


def test_the_kernel_of_several_numbers_has_the_trace_of_their_curvature():
    model = at_zero(RegressionMixin, nn.Linear(1, 4, bias=False))
    batch = torch.ones(1, 1).double(), numbers(1, 4)
    output = model.model_output(batch)
    weight = model.kernel_weight(output.detach(), batch)
    trace = 4 * 2 / 4  # of (2 / 4) Σ ∇ŷ ∇ŷᵀ, each of norm 1
    assert (weight * flat_gradient(output[0], model).square().sum()).item() == pytest.approx(trace)


def test_a_reduction_that_is_none():
    model = with_net(MultilabelMixin, nn.Linear(4, 5), reduction="median")
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'median'"):
        model.out_to_loss_grad((numbers(6, 4), TAGS))


PARTS = 6
LABELS = torch.arange(PARTS)[None] % 2
ONE_HOT = torch.eye(PARTS)[None].double()  # (1, channels, pixels): no two pixels share a weight


def at_zero(mixin, net):
    for value in net.parameters():
        nn.init.zeros_(value)
    return with_net(mixin, net.double())


@pytest.mark.parametrize(
    ("model", "batch", "logits"),
    [
        (
            at_zero(MultilabelMixin, nn.Linear(1, PARTS, bias=False)),
            (torch.ones(1, 1).double(), LABELS),
            lambda g, y: g,  # of the label that is there, against its absence
        ),
        (
            at_zero(SegmentationMixin, nn.Conv1d(PARTS, 2, 1, bias=False)),
            (ONE_HOT, LABELS),
            lambda g, y: (g[:, 1] - g[:, 0]),
        ),
        (
            at_zero(LanguageModelingMixin, nn.Embedding(2 * PARTS, 2)),
            (torch.tensor([[0, 3, 5, 7, 8, 10, 11]]) % 12, torch.tensor([[0, 1, 0, 1, 1, 0, 1]])),
            lambda g, y: (g[:, :-1, 1] - g[:, :-1, 0]),
        ),
    ],
)  # fmt: skip
def test_the_kernel_has_the_trace_of_the_curvature(model, batch, logits):
    """Of the mean of the parts' losses, Σ p (1 − p) ∇g ∇gᵀ / parts, where parts have nothing in common."""
    parts = logits(model(batch[0]), batch[1]).flatten()
    assert len(parts) == PARTS
    trace = sum(flat_gradient(part, model, retain_graph=True).square().sum() / 4 for part in parts) / PARTS
    output = model.model_output(batch)
    (weight,) = model.kernel_weight(output.detach(), batch)
    torch.testing.assert_close(weight * flat_gradient(output[0], model).square().sum(), trace)


def test_the_kernel_of_many_labels_does_not_vanish():
    """The probability of all together does."""
    model = with_net(MultilabelMixin, nn.Linear(1, 2000))
    batch = torch.ones(3, 1).double(), torch.ones(3, 2000).long()
    output = model.model_output(batch)
    assert (model.out_to_loss_curvature(batch) == 0).all()
    weight = model.kernel_weight(output.detach(), batch)
    assert (weight > 1e-4).all()
    assert torch.isfinite(weight).all()


def test_the_kernel_of_one_label_has_its_curvature():
    model = with_net(MultilabelMixin, nn.Linear(4, 1).double())
    batch = numbers(5, 4), torch.tensor([[0], [1], [1], [0], [1]])
    torch.testing.assert_close(
        model.kernel_weight(model.model_output(batch), batch), model.out_to_loss_curvature(batch)
    )
