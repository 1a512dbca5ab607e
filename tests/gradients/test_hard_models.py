"""Models that invite a wrong guess of where the examples are, or of how exact numbers are: right, by any engine."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_trak.features.featurizer import Featurizer
from lightning_trak.gradients import (
    EngineUnsuitable,
    HooksEngine,
    LoopEngine,
    ModelFunction,
    NotPrepared,
    Selector,
    VmapEngine,
    check_gradients,
    layer_rule,
)
from lightning_trak.gradients.memory import peak_bytes
from lightning_trak.projection import FactoredProjector, IdentityProjector, RademacherProjector, SparseProjector
from tests.benchmarks.models import LowRank


def mean_row(m, x):
    return m.head(m.table(x).mean(1)).squeeze(1)


class Model(nn.Module):
    """Parts, and how the outputs follow from them."""

    def __init__(self, output, **parts):
        super().__init__()
        self._output = output
        for name, part in parts.items():
            setattr(self, name, part)

    def model_output(self, x):
        return self._output(self, x)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def function_of(model, weights=None):
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    return ModelFunction(model.eval(), model.state_dict() if weights is None else weights, names)


def featurize(function, engine, batch, projector=None):
    if not isinstance(engine, LoopEngine):
        check_gradients(function, engine, batch, len(batch))
    return Featurizer(function, engine, projector or IdentityProjector(), key=1)(batch, len(batch)).features


def assert_right(function, engine, batch, tolerance=1e-4):
    expected = featurize(function, LoopEngine(), batch)
    difference = (featurize(function, engine, batch) - expected).norm() / expected.norm()
    assert difference < tolerance


class Shift(nn.Module):
    """Has no rule, and a second argument that all examples share."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x, position):
        return (x + position) * self.scale


def shifted(steps):
    position = torch.randn(steps, 3)
    return Model(lambda m, x: m.shift(m.one(x), position).tanh().sum((1, 2)), one=nn.Linear(3, 3), shift=Shift())


@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize("size", [1, 4, 5, 8])
def test_an_argument_as_long_as_the_batch(steps, size):
    function, x = function_of(shifted(steps)), torch.randn(9, steps, 3)
    engine = Selector("auto").choose(function, x[:4], 4)
    assert_right(function, engine, x[:size])


class Experts(nn.Module):
    """Every token goes to one of several linear layers."""

    def __init__(self, n):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3) for _ in range(n)])
        self.gate = nn.Linear(3, n)

    def forward(self, x):
        flat = x.reshape(-1, 3)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, None])
        return out.view_as(x)


@pytest.mark.parametrize(("experts", "tokens"), [(4, 1), (4, 6), (12, 2), (16, 4)])
@pytest.mark.parametrize("size", [2, 8])
def test_rows_sent_to_experts(experts, tokens, size):
    """Batch after batch: right, or refused, which makes another engine take over."""
    model = Model(lambda m, x: m.experts(x).tanh().sum((1, 2)), experts=Experts(experts))
    function, x = function_of(model), torch.randn(64, tokens, 3)
    choice = Selector("auto")
    engine = choice.choose(function, x[:4], 4)
    for batch in x.split(size):
        while True:
            try:
                assert_right(function, engine, batch)
                break
            except NotPrepared:
                engine.prepare(function, batch, size)
            except EngineUnsuitable as error:
                choice.reject(engine, error)
                engine = choice.choose(function, x[:4], 4)


def zero_head(layout):
    def time_first(m, x):
        return m.head(m.two(m.one(x.transpose(0, 1)).tanh()).transpose(0, 1).mean(1)).squeeze(1)

    def positions(m, x):
        return m.head((m.one(x) + m.two(x) + m.position(torch.arange(8))).tanh().mean(1)).squeeze(1)

    parts = {"one": nn.Linear(3, 5), "head": nn.Linear(5, 1)}
    if layout == "time first":
        return Model(time_first, two=nn.Linear(5, 5), **parts)
    return Model(positions, two=nn.Linear(3, 5), position=nn.Embedding(8, 5), **parts)


@pytest.mark.parametrize("layout", ["time first", "positions"])
@pytest.mark.parametrize("size", [3, 8, 16])
def test_a_head_of_zeros_tells_nothing_about_what_is_before_it(layout, size):
    model = zero_head(layout)
    trained = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    nn.init.zeros_(model.head.weight)
    x, engine = torch.randn(16, 8, 3), HooksEngine()
    engine.prepare(function_of(model), x[:4], 4)
    function = function_of(model, trained)
    with pytest.raises(NotPrepared, match="no gradient reached"):
        featurize(function, engine, x[:size])
    engine.prepare(function, x[:size], size)
    assert_right(function, engine, x[:size])


def test_what_was_learnt_from_one_batch_is_kept():
    model = Model(lambda m, x: (m.one(x[:, :3]) * x[:, 3:]).sum(1), one=nn.Linear(3, 3))
    seen, unseen = torch.randn(4, 6), torch.randn(4, 6)
    unseen[:, 3:] = 0
    engine, function = HooksEngine(), function_of(model)
    engine.prepare(function, seen, 4)
    engine.prepare(function, unseen, 4)
    assert_right(function, engine, seen)


def net(*sizes):
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def in_autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.net(x).float().logsumexp(1)


def autocast_out(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.net(x)[:, 0]


PRECISIONS = {
    "autocast, float32 out": (in_autocast, torch.float32, torch.float32),
    "autocast, bfloat16 out": (autocast_out, torch.float32, torch.float32),
    "bfloat16 weights, float32 out": (lambda m, x: m.net(x).float().logsumexp(1), torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("case", PRECISIONS)
@pytest.mark.parametrize("projector", [FactoredProjector(64, rank=8), SparseProjector(64)])
def test_mixed_precision(case, projector):
    output, weights, inputs = PRECISIONS[case]
    model = Model(output, net=net(20, 30, 30, 3).to(weights))
    function, x = function_of(model), torch.randn(8, 20).to(inputs)
    function.observe(x)
    assert function.tolerance == 0.05
    choice = Selector("auto")
    engine = choice.choose(function, x[:4], 4)
    assert str(choice) == "gradients by hooks"
    assert_right(function, engine, x, tolerance=0.05)
    assert featurize(function, engine, x, projector).isfinite().all()


def test_float32_adapters_on_a_bfloat16_backbone():
    def output(m, x):
        hidden = m.frozen(x.bfloat16())
        return (hidden + m.up(m.down(x)).bfloat16()).relu().float().logsumexp(1)

    model = Model(output, frozen=net(20, 64, 40).bfloat16(), down=nn.Linear(20, 2), up=nn.Linear(2, 40))
    model.frozen.requires_grad_(False)
    function, x = function_of(model), torch.randn(16, 20)
    assert set(function.parameters) == {"down.weight", "down.bias", "up.weight", "up.bias"}
    engine = Selector("auto").choose(function, x[:4], 4)
    assert_right(function, engine, x, tolerance=0.05)


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_sparse_embedding_gradients(engine):
    model = Model(mean_row, table=nn.Embedding(9, 4, sparse=True), head=nn.Linear(4, 1))
    dense = Model(mean_row, table=nn.Embedding(9, 4), head=nn.Linear(4, 1))
    x = torch.randint(0, 9, (6, 3))
    expected = featurize(function_of(dense, model.state_dict()), LoopEngine(), x)
    function = function_of(model)
    found = featurize(function, Selector(engine).choose(function, x[:4], 4), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("leading", [True, False])
def test_two_layers_in_a_row_that_all_examples_share(leading):
    positions = torch.arange(5)[None] if leading else torch.arange(5)

    def output(m, x):
        return (m.one(x) + m.two(m.position(positions))).tanh().sum((1, 2))

    model = Model(output, one=nn.Linear(3, 3), position=nn.Embedding(5, 3), two=nn.Linear(3, 3))
    function, x = function_of(model), torch.randn(9, 5, 3)
    engine = Selector("auto").choose(function, x[:4], 4)
    assert isinstance(engine, HooksEngine)
    assert_right(function, engine, x)


@pytest.mark.usefixtures("_restored_rules")
def test_an_output_that_is_not_used():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x * self.weight, x + self.weight

    @layer_rule(Two)
    def two(layer, call):
        return {"weight": call.grad * call.input}

    model = Model(lambda m, x: m.two(x)[1].cos().sum(1), two=Two())
    function, x = function_of(model), torch.randn(6, 3)
    assert_right(function, Selector("auto").choose(function, x[:4], 4), x)


def test_a_rule_takes_types():
    with pytest.raises(TypeError, match="layer_rule takes types of modules"):
        layer_rule(lambda layer, call: {})
    with pytest.raises(TypeError, match="got none"):
        layer_rule()


@pytest.mark.usefixtures("_restored_rules")
def test_a_rule_that_fails_is_an_error_that_names_the_layer():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x * self.weight

    @layer_rule(Own)
    def own(layer, call):
        return {"weight": call.grad.flatten(1, -2)}

    function, x = function_of(Model(lambda m, x: m.own(x).cos().sum(1), own=Own())), torch.randn(6, 3)
    with pytest.raises(ValueError, match=r"The rule for Own fails with .*Its input is \(4, 3\)"):
        Selector("auto").choose(function, x[:4], 4)


def test_a_shared_parameter_in_a_module_that_cannot_be_run_again_is_left_to_others():
    class Transposed(nn.Module):
        """Its backward hook is of no use to torch.func."""

        def __init__(self, weight):
            super().__init__()
            self.weight = weight
            self.register_full_backward_hook(lambda *_: None)

        def forward(self, x):
            return x @ self.weight

    one = nn.Linear(4, 4)
    model = Model(lambda m, x: m.other(m.one(x).tanh()).cos().sum(1), one=one, other=Transposed(one.weight))
    function, x = function_of(model), torch.randn(6, 4)
    engine = HooksEngine()
    engine.prepare(function, x[:4], 4)
    assert_right(function, engine, x)
    assert "loop for 1 of 2 parameters (one.weight" in str(engine)


def test_modules_are_as_before_after_an_error_in_the_backward_pass():
    model = Model(lambda m, x: m.rnn(m.net(x))[0].sum((1, 2)), net=net(3, 4, 4), rnn=nn.LSTM(4, 5, batch_first=True))
    function, x = function_of(model), torch.randn(4, 6, 3)
    engine = HooksEngine()
    engine.prepare(function, x, 4)
    before = [(dict(vars(part)), dict(part._parameters)) for part in model.modules()]

    def full(rows, name, gradient):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        engine(function, x, 4, full)
    for part, (attributes, parameters) in zip(model.modules(), before, strict=True):
        assert "forward" not in vars(part)
        assert vars(part).keys() == attributes.keys()
        assert all(part._parameters[name] is value for name, value in parameters.items())
    assert all(one is other for one, other in zip(model.rnn._flat_weights, model.rnn._parameters.values(), strict=True))


def test_memory_with_a_sparse_matrix():
    adjacency = torch.eye(5).to_sparse()
    assert peak_bytes(lambda: adjacency @ torch.ones(5, 3), torch.device("cpu")) >= 60


def operations(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_adapters_on_a_frozen_backbone_cost_what_adapters_cost():
    """Counted in multiplications: as many as training them takes, and less than two thirds of training it all."""

    def output(m, x):
        return m.head(x + m.two(torch.relu(m.one(x)))).mean((1, 2))

    def build():
        return Model(output, one=nn.Linear(96, 384), two=nn.Linear(384, 96), head=nn.Linear(96, 2))

    def training(model):
        return operations(lambda: model.model_output(x).sum().backward())

    x = torch.randn(16, 40, 96)
    adapted = build().requires_grad_(False)
    adapted.one, adapted.two = LowRank(adapted.one, 4), LowRank(adapted.two, 4)
    function = function_of(adapted)
    assert set(function.parameters) == {f"{part}.{side}.weight" for part in ("one", "two") for side in ("down", "up")}
    engine = Selector("auto").choose(function, x[:4], 4)
    ours = operations(lambda: engine(function, x, len(x), lambda rows, name, gradient: gradient.dense()))
    assert ours <= 1.001 * training(adapted) < 2 / 3 * training(build())
    assert_right(function, engine, x)


@pytest.mark.parametrize("projector", [IdentityProjector, SparseProjector, FactoredProjector, RademacherProjector])
@pytest.mark.parametrize("engine", [HooksEngine, VmapEngine, LoopEngine])
def test_a_parameter_that_is_a_single_number(engine, projector):
    model = Model(
        lambda m, x: m.scale * m.layer(x).squeeze(1), layer=nn.Linear(3, 1), scale=nn.Parameter(torch.ones(()))
    )
    function, batch = function_of(model), torch.randn(5, 3)
    names = list(function.parameters)
    rows = []
    for x in batch:  # ∂f/∂scale is the layer's output
        grads = {"scale": model.layer(x[None]).detach().flatten(), "layer.weight": x, "layer.bias": torch.ones(1)}
        rows.append(torch.cat([grads[name] for name in names]))
    own = projector() if projector is IdentityProjector else projector(64)
    expected, chosen = torch.zeros(5, own.dimension(5)), engine()
    own.add_(expected, torch.stack(rows), 0, 1)
    chosen.prepare(function, batch, 5)
    torch.testing.assert_close(featurize(function, chosen, batch, own), expected)
