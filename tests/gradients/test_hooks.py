"""The hook engine where layers are used in unusual ways: right, or handed over, and never quietly wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_trak.data.batch import map_tensors
from lightning_trak.gradients import (
    EngineUnsuitable,
    HooksEngine,
    ModelFunction,
    NotPrepared,
    Selector,
    VmapEngine,
    check_gradients,
    layer_rule,
)
from tests.gradients.test_gradients import collect, reference


class Model(nn.Module):
    """A model whose forward is a function of itself and its input."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def model_output(self, batch):
        out = self._forward(self, batch)
        return (out * torch.arange(1, out.shape[-1] + 1, dtype=out.dtype)).tanh().flatten(1).sum(1)


def linear(*sizes):
    return nn.Linear(*sizes)


def flat_major(model, x):
    return model.two(model.one(x.flatten(0, 1)).relu()).unflatten(0, (len(x), -1))


def flat_minor(model, x):
    hidden = model.two(model.one(x.transpose(0, 1).flatten(0, 1)).relu())
    return hidden.unflatten(0, (-1, len(x))).transpose(0, 1)


def frames(model, x):
    """Frames of a clip as one long batch of images."""
    return model.conv(x.flatten(0, 1)).flatten(1).unflatten(0, (len(x), -1))


def frames_minor(model, x):
    hidden = model.conv(x.transpose(0, 1).flatten(0, 1)).flatten(1)
    return hidden.unflatten(0, (-1, len(x))).transpose(0, 1)


def in_place(model, x):
    hidden = F.relu(model.one(x), inplace=True)
    out = model.two(hidden)
    out += hidden
    return out.mul_(2)


class Scaled(nn.Module):
    """A norm that no rule knows."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()


def checkpointed(reentrant):
    def forward(model, x):
        hidden = model.zero(x)
        run = lambda h: model.two(model.one(h).tanh())  # noqa: E731
        return checkpoint(run, hidden, use_reentrant=reentrant)

    return forward


CASES = {
    "time first": (lambda m, x: m.two(m.one(x.transpose(0, 1)).relu()).transpose(0, 1), {}, (5, 3)),
    "as many steps as examples": (lambda m, x: m.two(m.one(x.transpose(0, 1)).relu()).transpose(0, 1), {}, (4, 3)),
    "as many steps as examples, batch first": (lambda m, x: m.two(m.one(x).relu()), {}, (4, 3)),
    "flattened, examples major": (flat_major, {}, (5, 3)),
    "flattened, positions major": (flat_minor, {}, (5, 3)),
    "frames, examples major": (frames, {"conv": nn.Conv2d(2, 3, 2)}, (4, 2, 3, 3)),
    "frames, frames major": (frames_minor, {"conv": nn.Conv2d(2, 3, 2)}, (4, 2, 3, 3)),
    "in-place activations": (in_place, {}, (5, 3)),
    "called three times": (lambda m, x: m.two(m.one(m.one(m.one(x).tanh()).tanh())), {}, (3,)),
    "not called at all": (lambda m, x: m.two(x), {}, (3,)),
    "position embedding": (
        lambda m, x: m.two(m.one(x) + m.position(torch.arange(5)[None])),
        {"position": nn.Embedding(5, 3)},
        (5, 3),
    ),
    "position embedding without a batch axis": (
        lambda m, x: m.two(m.one(x) + m.position(torch.arange(4))),
        {"position": nn.Embedding(4, 3)},
        (4, 3),
    ),
    "a scale": (lambda m, x: m.two(m.one(x)) * m.scale.exp(), {"scale": nn.Parameter(torch.tensor(0.5))}, (3,)),
    "a scale of positions": (
        lambda m, x: m.scale.exp() * m.two(m.one(x)),
        {"scale": nn.Parameter(torch.tensor(0.5))},
        (5, 3),
    ),
    "a shift": (lambda m, x: m.two(m.one(x)) + m.shift, {"shift": nn.Parameter(torch.ones(3))}, (3,)),
    "a shift of positions": (lambda m, x: m.two(m.one(x) + m.shift), {"shift": nn.Parameter(torch.ones(3))}, (4, 3)),
    "a shift of pixels": (lambda m, x: m.two(m.one(x) + m.shift), {"shift": nn.Parameter(torch.ones(3))}, (4, 4, 3)),
    "a token": (
        lambda m, x: m.two(torch.cat([m.token.expand(len(x), -1, -1), m.one(x)], 1)),
        {"token": nn.Parameter(torch.ones(1, 1, 3))},
        (5, 3),
    ),
    "positions": (lambda m, x: m.two(m.one(x) + m.places), {"places": nn.Parameter(torch.ones(4, 3))}, (4, 3)),
    "a module without a rule": (lambda m, x: m.two(m.own(m.one(x))), {"own": Scaled(3)}, (4, 3)),
    "a module without a rule, time first": (
        lambda m, x: m.two(m.own(m.one(x.transpose(0, 1)))).transpose(0, 1),
        {"own": Scaled(3)},
        (5, 3),
    ),
    "activation checkpointing": (checkpointed(False), {"zero": nn.Linear(3, 3)}, (5, 3)),
    "reentrant activation checkpointing": (checkpointed(True), {"zero": nn.Linear(3, 3)}, (5, 3)),
}


def build(case):
    torch.manual_seed(0)
    forward, parts, shape = CASES[case]
    model = Model(forward, **parts, one=linear(3, 3), two=linear(3, 3)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value))
    return model, shape


def run(model, batch, tried=None):
    names = [name for name, _ in model.named_parameters()]
    function = ModelFunction(model, model.state_dict(), names)
    engine = HooksEngine()
    tried = map_tensors(batch, lambda tensor: tensor[:4]) if tried is None else tried
    engine.prepare(function, tried, 4)
    outputs, gradients = collect(engine, function, batch, len(batch))
    expected_outputs, expected = reference(model, batch, len(batch), names)
    torch.testing.assert_close(outputs.double(), torch.from_numpy(expected_outputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients.double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-5)
    return engine


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("case", CASES)
def test_right_by_hooks_alone(case, size):
    model, shape = build(case)
    engine = run(model, torch.randn(size, *shape), tried=torch.randn(4, *shape))
    if "reentrant" not in case:
        assert str(engine) == "hooks"


def masked(model, x):
    """A token in the place of some positions: one in each of the first examples, any number later."""
    hidden = model.one(x).clone()
    hidden[x[..., 0] > 9] = model.own
    return model.two(hidden)


def with_marks(*counts):
    x = torch.randn(len(counts), 6, 3)
    for row, count in enumerate(counts):
        x[row, :count, 0] = 10
    return x


NOT_COPIED = {  # what a copy for each example would be mistaken in, in one batch or another
    "a slice": (
        lambda m, x: m.two(m.one(x) + m.own[: x.shape[1]]),
        (10, 3),
        [torch.randn(size, length, 3) for size, length in ((4, 10), (32, 10), (8, 7), (3, 1))],
    ),
    "a mask": (masked, (3,), [with_marks(1, 1, 1, 1), with_marks(2, 0, 1, 1, 1, 1), with_marks(0, 3), with_marks(1)]),
    "channels": (
        lambda m, x: m.two(m.one(x) + m.own[:, None]),
        (3,),
        [torch.randn(size, 3, 3) for size in (4, 3, 8)],
    ),
    "a layer of one's own": (
        lambda m, x: m.two(m.one(x) @ m.own),
        (3, 3),
        [torch.randn(4, 5, 3), torch.randn(2, 1, 3)],
    ),
}


@pytest.mark.parametrize("value", [torch.randn, torch.zeros])
@pytest.mark.parametrize("case", NOT_COPIED)
def test_what_is_no_scale_or_token_is_not_copied(case, value):
    torch.manual_seed(0)
    forward, shape, batches = NOT_COPIED[case]
    model = Model(forward, one=linear(3, 3), two=linear(3, 3), own=nn.Parameter(value(shape))).eval()
    for batch in batches[1:]:
        engine = run(model, batch, tried=batches[0])
        assert not engine._copies


def test_copies_that_do_not_fit_a_batch_are_given_up():
    """The first examples have one position each, so that copies fit them; then one batch has more."""
    model = Model(
        lambda m, x: m.two(m.one(x.flatten(0, 1)) * m.scale).unflatten(0, (len(x), -1)),
        one=linear(3, 3), two=linear(3, 3), scale=nn.Parameter(torch.randn(3)),
    ).eval()  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    function, engine = ModelFunction(model, model.state_dict(), names), HooksEngine()
    engine.prepare(function, torch.randn(4, 1, 3), 4)
    assert engine._copies
    batch = torch.randn(5, 6, 3)
    with pytest.raises(NotPrepared, match="copies of scale did not fit this batch"):
        engine(function, batch, 5, lambda *_: None)
    engine.prepare(function, batch, 5)
    assert not engine._copies
    _, gradients = collect(engine, function, batch, 5)
    _, expected = reference(model, batch, 5, names)
    torch.testing.assert_close(gradients.double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-5)


class ByRow(nn.Module):
    """Has no rule, and takes no copies."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.stack([row * self.weight for row in x])


HANDED_OVER = {
    "a module that the batch goes through twice": (
        lambda m, x: m.by_row(m.one(x).repeat(2, 1))[: len(x)],
        {"by_row": ByRow()},
        "vmap for 1 of 5 parameters (by_row.weight: an output of ByRow has no batch axis in front)",
    ),
    "a parameter of the model itself": (
        lambda m, x: m.two(m.one(x)) @ m.mix,
        {"mix": nn.Parameter(torch.ones(3, 3))},
        "vmap for 1 of 5 parameters (mix: used outside its module)",
    ),
    "a layer's weight used without it": (
        lambda m, x: m.two(m.one(x)) @ m.one.weight.T,
        {},
        "vmap for 1 of 4 parameters (one.weight: used outside its module)",
    ),
    "weight normalisation": (
        lambda m, x: m.two(m.one(x)) + m.third(x),
        {"third": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))},
        "vmap for 2 of 7 parameters",
    ),
    "what vmap cannot do either": (
        lambda m, x: m.two(m.one(x)) @ (m.mix if x.sum().item() > -1e9 else 0),
        {"mix": nn.Parameter(torch.ones(3, 3))},
        "loop for 1 of 5 parameters",
    ),
}


@pytest.mark.parametrize("case", HANDED_OVER)
def test_some_parameters_are_handed_over(case):
    torch.manual_seed(0)
    forward, parts, message = HANDED_OVER[case]
    model = Model(forward, **parts, one=linear(3, 3), two=linear(3, 3)).eval()
    engine = run(model, torch.randn(6, 3))
    assert message in str(engine)


def test_an_input_overwritten_later_is_noticed():
    def forward(model, x):
        hidden = model.zero(x)
        kept = hidden.detach().clone()
        out = model.one(kept)
        if len(x) > 4:
            kept.mul_(2)
        return out + model.two(hidden)

    model = Model(forward, zero=linear(3, 3), one=linear(3, 3), two=linear(3, 3)).eval()
    with pytest.raises(EngineUnsuitable, match="an input of one is modified in place"):
        run(model, torch.randn(6, 3))


def test_another_use_of_a_parameter_that_shows_later_is_noticed():
    model = Model(lambda m, x: m.one(x) + (m.one.weight[0] if len(x) > 4 else 0), one=linear(3, 3)).eval()
    with pytest.raises(EngineUnsuitable, match=r"one\.weight is used outside its layers, but was not on the first"):
        run(model, torch.randn(6, 3))


def test_the_modules_are_as_before():
    model, shape = build("in-place activations")
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    parameters = dict(model.named_parameters())
    run(model, torch.randn(4, *shape))
    assert all(vars(part).keys() == before[name].keys() for name, part in model.named_modules())
    assert all(value is parameters[name] and value.grad is None for name, value in model.named_parameters())


def test_modules_are_as_before_after_an_error():
    model = Model(lambda m, x: m.one(x), one=linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(model, torch.randn(4, 5))
    assert "forward" not in vars(model.one)
    assert isinstance(model.one.weight, nn.Parameter)


@pytest.mark.usefixtures("_restored_rules")
def test_gradients_that_are_wrong_do_not_add_up():
    model, shape = build("called three times")
    batch = torch.randn(6, *shape)
    function = ModelFunction(model, model.state_dict(), [name for name, _ in model.named_parameters()])
    engine = HooksEngine()

    def check():
        engine.prepare(function, batch[:4], 4)
        check_gradients(function, engine, batch, 6)

    check()

    @layer_rule(nn.Linear)
    def forgets_the_bias(layer, call):
        return {"weight": torch.einsum("bo,bi->boi", call.grad, call.input), "bias": 0 * call.grad}

    with pytest.raises(ValueError, match=r"gradients of one\.bias do not add up to its gradient over the batch"):
        check()

    @layer_rule(nn.Linear)
    def mixes_examples(layer, call):  # their plain sum is right
        return {"weight": torch.einsum("bo,bi->boi", call.grad, call.input).flip(0), "bias": call.grad}

    with pytest.raises(ValueError, match=r"gradients of one\.weight do not add up"):
        check()


def test_engines_are_tried_in_order():
    torch.manual_seed(0)
    bare = Model(lambda m, x: x @ m.mix, mix=nn.Parameter(torch.ones(3, 3)))
    function = ModelFunction(bare, bare.state_dict(), ["mix"])
    choice = Selector("auto")
    engine = choice.choose(function, torch.randn(4, 3), 4)
    assert isinstance(engine, VmapEngine)
    assert str(choice).startswith("gradients by vmap; not hooks, as no parameter is left to hooks; e.g. mix")
    choice.reject(engine, EngineUnsuitable("reasons"))
    engine = choice.choose(function, torch.randn(4, 3), 4)
    assert str(engine) == "loop"
    assert "not vmap, as reasons" in str(choice)
    choice.reject(engine, EngineUnsuitable("more"))
    with pytest.raises(ValueError, match="gradients='auto' cannot differentiate this model: no parameter is left"):
        choice.choose(function, torch.randn(4, 3), 4)  # hooks may do at other weights, so they are tried again
    only = Selector("loop")
    with pytest.raises(ValueError, match=r"gradients='loop' cannot differentiate this model: more\.$"):
        only.reject(engine, EngineUnsuitable("more"))
    with pytest.raises(ValueError, match="gradients='hooks' cannot differentiate this model: no parameter is left"):
        Selector("hooks").choose(function, torch.randn(4, 3), 4)


class Labelled(torch.Tensor):
    """Copies of it are views of a plain tensor, as those of MONAI's MetaTensor."""

    def clone(self):
        return self.as_subclass(torch.Tensor).clone().as_subclass(Labelled)


@pytest.mark.parametrize("forward", [lambda m, x: m.two(m.one(x).relu()), lambda m, x: m.two(m.one(x).mul_(2).relu_())])
def test_tensors_of_a_class_of_their_own(forward):
    torch.manual_seed(0)
    model, x = Model(forward, one=linear(3, 4), two=linear(4, 3)).eval(), torch.randn(6, 3)
    names = [name for name, _ in model.named_parameters()]
    function, engine = ModelFunction(model, model.state_dict(), names), HooksEngine()
    engine.prepare(function, x[:4].as_subclass(Labelled), 4)
    assert str(engine) == "hooks"
    _, gradients = collect(engine, function, x.as_subclass(Labelled), 6)
    torch.testing.assert_close(
        gradients.double(), torch.from_numpy(reference(model, x, 6, names)[1]), rtol=1e-3, atol=1e-5
    )
