"""Every layer's rule against one backward pass at a time, in float64, over shapes and options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_trak.gradients import ConvGradient, DenseGradient, HooksEngine, LayerCall, ModelFunction, layer_rule
from lightning_trak.gradients.rules import find_rule
from tests.conftest import Shift

SIZES = st.sampled_from([0, 1, 2, 3])


class Net(nn.Module):
    """A layer between a weighting of its input and a nonlinear sum of its output, so that nothing is symmetric."""

    def __init__(self, layer, call=None):
        super().__init__()
        self.layer = layer
        self.call = call or (lambda layer, x: layer(x))

    def model_output(self, batch):
        out = self.call(self.layer, batch)
        out = out if isinstance(out, tuple) else (out,)
        return sum(part.flatten(1).cos().mul(_ramp(part)).sum(1) for part in out)


def _ramp(part):
    return torch.linspace(0.5, 1.5, part[0].numel() if len(part) else 1, dtype=part.dtype)


def randomised(module):
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.2)
    return module.double().eval()


def reference(module, batch):
    """One example, one backward pass."""
    rows = []
    for row in range(len(batch)):
        output = module.model_output(batch[row : row + 1]).sum()
        gradients = torch.autograd.grad(output, list(module.parameters()), allow_unused=True)
        rows.append(
            [torch.zeros_like(p) if g is None else g for p, g in zip(module.parameters(), gradients, strict=True)]
        )
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def check(module, batch, tried=None, rules=True):
    """Compare the hook engine with the reference, and every form of every gradient with its dense form."""
    names = [name for name, _ in module.named_parameters()]
    function = ModelFunction(module, module.state_dict(), names)
    engine = HooksEngine()
    tried = batch if tried is None else tried
    engine.prepare(function, tried, len(tried))
    if rules:
        assert str(engine) == "hooks"
        assert all(layer.rule is not None for layer in engine._layers)
    found = {name: torch.zeros(len(batch), *value.shape).double() for name, value in module.named_parameters()}

    def sink(rows, name, gradient):
        dense = gradient.dense()
        found[name][rows] += dense
        check_forms(gradient, dense)

    outputs = engine(function, batch, len(batch), sink)
    assert torch.allclose(outputs, module.model_output(batch))
    for name, expected in zip(names, reference(module, batch), strict=bool(len(batch))):
        scale = expected.abs().max().item() + 1e-3
        assert torch.allclose(found[name], expected, rtol=0, atol=1e-8 * scale), name
    return engine


def check_forms(gradient, dense):
    """Sketches, slices and parts of a gradient are those of its dense form."""
    assert (gradient.size, *gradient.shape) == dense.shape
    parts = [(rows, part.dense()) for rows, part in gradient.split(max_bytes=1)]
    assert all(torch.allclose(part, dense[rows]) for rows, part in parts)
    assert sum(len(part) for _, part in parts) == len(dense)
    weights = torch.randn(len(dense)).double()
    assert torch.allclose(gradient.weighted_sum(weights), torch.einsum("i,i...->...", weights, dense))
    if len(dense):
        assert torch.allclose(gradient.fold(1).dense(), dense.sum(0, keepdim=True))
        assert torch.allclose(gradient.fold(1).weighted_sum(weights[:1]), weights[0] * dense.sum(0))
        assert torch.allclose(gradient.fold(1)[0:1].dense(), dense.sum(0, keepdim=True))
    if dense.ndim < 3:
        return
    matrix = dense.flatten(2)
    left, right = torch.randn(matrix.shape[1], 2).double(), torch.randn(matrix.shape[2], 3).double()
    for one in (None, left):
        for other in (None, right):
            expected = matrix if one is None else one.T @ matrix
            expected = expected if other is None else expected @ other
            assert torch.allclose(gradient.sketch(one, other), expected)
            if len(dense):
                assert torch.allclose(gradient.fold(1).sketch(one, other), expected.sum(0, keepdim=True))


@settings(max_examples=30, deadline=None)
@given(SIZES, st.lists(st.integers(1, 3), max_size=2), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_linear(size, positions, inputs, outputs, bias):
    module = Net(randomised(nn.Linear(inputs, outputs, bias)))
    check(module, torch.randn(size, *positions, inputs).double(), tried=torch.randn(2, *positions, inputs).double())


@st.composite
def convolutions(draw, transposed=False):
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    per_axis = [
        (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 2)))
        for _ in range(axes)
    ]
    kernel, stride, padding, dilation = (tuple(column) for column in zip(*per_axis, strict=True))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    channels = (groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)))
    length = [d * (k - 1) + 1 + draw(st.integers(2, 4)) for k, d in zip(kernel, dilation, strict=True)]
    if transposed:
        limit = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, most)) for most in limit)
        options["padding"] = tuple(min(p, d * (k - 1)) for p, k, d in zip(padding, kernel, dilation, strict=True))
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        return randomised(kind(*channels, kernel, **options)), (channels[0], *length)
    options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    options["padding"] = padding
    if draw(st.booleans()):
        options.update(padding="same", stride=(1,) * axes)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return randomised(kind(*channels, kernel, **options)), (channels[0], *length)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's own, of its copy of the input
@settings(max_examples=80, deadline=None)
@given(SIZES, convolutions())
def test_convolution(size, case):
    layer, shape = case
    check(Net(layer), torch.randn(size, *shape).double(), tried=torch.randn(2, *shape).double())


@settings(max_examples=60, deadline=None)
@given(SIZES, convolutions(transposed=True))
def test_transposed_convolution(size, case):
    layer, shape = case
    check(Net(layer), torch.randn(size, *shape).double(), tried=torch.randn(2, *shape).double())


@settings(max_examples=30, deadline=None)
@given(SIZES, st.lists(st.integers(1, 4), max_size=2), st.sampled_from([None, 0, 2]))
def test_embedding(size, positions, padding_idx):
    layer = nn.Embedding(4, 3, padding_idx=padding_idx)
    tokens = torch.randint(0, 4, (size, *positions))
    check(Net(randomised(layer)), tokens, tried=torch.randint(0, 4, (2, *positions)))


NORMS = {
    "layer norm": (lambda: nn.LayerNorm(4), (4,)),
    "layer norm, positions": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "layer norm, two axes": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "RMS norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "RMS norm with eps": (lambda: nn.RMSNorm((3, 4), eps=0.1), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group norm without positions": (lambda: nn.GroupNorm(2, 4), (4,)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 2)),
    "instance norm, running": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 4, 2)),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 2, 3)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch norm 1d, positions": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4, eps=0.1), (4, 3, 2)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), (2, 3, 2, 2)),
    "PReLU": (lambda: nn.PReLU(), (3, 4)),
    "PReLU of channels": (lambda: nn.PReLU(3), (3, 4, 2)),
    "PReLU of features": (lambda: nn.PReLU(3), (3,)),
}


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("case", NORMS)
def test_normalisation_and_activation(case, size):
    torch.manual_seed(0)
    make, shape = NORMS[case]
    if size == 0 and "norm" in case and "layer" not in case and "RMS" not in case:
        size = 2  # torch itself refuses an empty batch
    check(Net(randomised(make())), torch.randn(size, *shape).double(), tried=torch.randn(3, *shape).double())


ATTENTIONS = {
    "self": ({}, lambda layer, x: layer(x, x, x)[0]),
    "without weights": ({}, lambda layer, x: layer(x, x, x, need_weights=False)[0]),
    "keywords": ({}, lambda layer, x: layer(query=x, key=x, value=x)[0]),
    "cross": ({}, lambda layer, x: layer(x, x.flip(1), 2 * x)[0]),
    "other widths": ({"kdim": 2, "vdim": 3}, lambda layer, x: layer(x, x[..., :2], x[..., :3])[0]),
    "no bias": ({"bias": False}, lambda layer, x: layer(x, x, x)[0]),
    "zero attention": ({"add_zero_attn": True}, lambda layer, x: layer(x, x, x)[0]),
    "padding mask": ({}, lambda layer, x: layer(x, x, x, key_padding_mask=x[..., 0] > 1)[0]),
    "causal": (
        {},
        lambda layer, x: layer(x, x, x, attn_mask=torch.ones(3, 3).triu(1).bool(), is_causal=True, need_weights=False)[
            0
        ],
    ),
    "batch second": (
        {"batch_first": False},
        lambda layer, x: layer(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1),
    ),
}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("first", ["linear before", "nothing before"])
@pytest.mark.parametrize("case", ATTENTIONS)
def test_multihead_attention(case, first, size):
    torch.manual_seed(1)
    options, call = ATTENTIONS[case]
    layer = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})
    layers = nn.ModuleList([nn.Linear(4, 4) if first == "linear before" else nn.Identity(), layer])
    module = Net(randomised(layers), lambda layers, x: call(layers[1], layers[0](x)))
    check(module, torch.randn(size, 3, 4).double())


def test_multihead_attention_that_the_rule_refuses_is_right_all_the_same():
    torch.manual_seed(0)
    for layer, call in (
        (nn.MultiheadAttention(4, 2, batch_first=True), lambda layer, x: layer(x, x, x)),  # both outputs are used
        (nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True), lambda layer, x: layer(x, x, x)[0]),
    ):
        engine = check(Net(randomised(layer), call), torch.randn(3, 3, 4).double(), rules=False)
        assert engine._layers[0].rule is None


@pytest.mark.parametrize("used", ["outputs", "last state", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(kind, options, batch_first, used):
    torch.manual_seed(0)

    def call(layers, x):
        out, state = layers[1](layers[0](x if batch_first else x.transpose(0, 1)))
        state = torch.cat(state if isinstance(state, tuple) else (state,), -1).transpose(0, 1)
        out = out if batch_first else out.transpose(0, 1)
        return {"outputs": (out,), "last state": (state,), "both": (out, state)}[used]

    layers = nn.ModuleList([nn.Linear(3, 3), kind(3, 2, batch_first=batch_first, **options)])
    check(Net(randomised(layers), call), torch.randn(4, 5, 3).double())


def test_recurrent_with_an_initial_state():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(3, 2), nn.LSTM(3, 2, batch_first=True), nn.GRU(2, 2, batch_first=True)])

    def call(layers, x):
        start = layers[0](x[:, 0])[None]
        out, (h, _) = layers[1](x, (start, start.tanh()))
        return layers[2](out, hx=h)[0]

    check(Net(randomised(layers), call), torch.randn(4, 5, 3).double())


def test_recurrent_that_the_rule_refuses_is_right_all_the_same():
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, proj_size=2, batch_first=True)
    check(Net(randomised(layer), lambda layer, x: layer(x)[0]), torch.randn(3, 4, 3).double(), rules=False)


@pytest.mark.usefixtures("_restored_rules")
def test_a_rule_of_ones_own():
    assert find_rule(Shift()) is None

    @layer_rule(Shift)
    def shift(layer, call: LayerCall):
        return {"shift": call.grad}

    engine = check(Net(randomised(Shift())), torch.randn(3, 3).double())
    assert engine._layers[0].rule is shift

    @layer_rule(f"{Shift.__module__}.{Shift.__qualname__}x", Shift)
    def wrong(layer, call):
        return {"shift": DenseGradient(call.grad[:, :2])}

    with pytest.raises(
        ValueError, match=r"rule for Shift returned gradients of shift of shape \(3, 2\); expected \(3, 3\)"
    ):
        check(Net(randomised(Shift())), torch.randn(3, 3).double())


def test_rules_hold_for_a_layers_own_forward_alone():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Same(nn.Linear):
        pass

    assert find_rule(Twice(2, 2)) is None
    assert find_rule(Same(2, 2)) is find_rule(nn.Linear(2, 2))
    changed = nn.Linear(2, 2)
    changed.forward = lambda x: x
    assert find_rule(changed) is None
    check(Net(randomised(Twice(3, 2))), torch.randn(3, 4, 3).double(), rules=False)


@pytest.mark.parametrize("size", [1, 8, 19])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2}])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_weighted_sums_of_convolutions_are_those_of_the_gradients(size, options, axes):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](4, 6, 3, bias=False, **options)
    inputs, weights = torch.randn(size, 4, *[7] * axes), torch.randn(size)
    gradient = ConvGradient(
        inputs, torch.randn_like(layer(inputs)), layer.weight.shape, stride=layer.stride, padding=layer.padding,
        dilation=layer.dilation, groups=layer.groups,
    )  # fmt: skip
    expected = torch.tensordot(weights.double(), gradient.dense().double(), 1)
    torch.testing.assert_close(gradient.weighted_sum(weights).double(), expected, rtol=1e-4, atol=1e-4)
