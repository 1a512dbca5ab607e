"""Per-sample gradients against one backward pass at a time in float64."""

from __future__ import annotations

import copy
from collections import UserDict, defaultdict
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_trak.data.batch import NumberedBatch, describe, map_tensors, tensors_of, with_tensors
from lightning_trak.features.featurizer import Featurizer
from lightning_trak.gradients import (
    ENGINES,
    EngineUnsuitable,
    HooksEngine,
    LoopEngine,
    ModelFunction,
    VmapEngine,
    batch_gradient,
    check_gradients,
)
from lightning_trak.projection import make_projector


class Net(nn.Module):
    """A network whose output is a fixed combination of its logits, for batches of any structure."""

    def __init__(self, net, inputs=lambda batch: batch):
        super().__init__()
        self.net, self.inputs = net, inputs

    def model_output(self, batch):
        logits = self.net(self.inputs(batch))
        return (logits * torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype)).tanh().sum(1)


class Tied(nn.Module):
    """One weight in two layers; a layer called twice; a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.weight = self.one.weight
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x):
        return self.last(self.two(self.one(self.one(x).tanh() + self.shift).tanh()))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, tokens):
        hidden = self.table(tokens) * self.scale
        return hidden.mean(1) @ self.table.weight.T


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Record:
    x: Any
    note: str = "kept"


@dataclass(slots=True)
class Graphs:
    """Made of something else than it holds, as chemprop's BatchMolGraph; a field may be left unset."""

    graphs: InitVar[list[Any]]
    nodes: Any = field(init=False)
    edges: Any = field(init=False)

    def __post_init__(self, graphs):
        self.nodes = torch.cat(graphs)


def conv():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(16, 3)
    )
    net(torch.randn(8, 2, 7, 7))  # moves the running statistics away from their start
    return net


CASES = {
    "mlp": lambda: (Net(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))), torch.randn(6, 4)),
    "conv with batch norm": lambda: (Net(conv()), torch.randn(6, 2, 7, 7)),
    "tied": lambda: (Net(Tied()), torch.randn(6, 4)),
    "tied embedding": lambda: (Net(Embedded()), torch.randint(0, 7, (6, 3))),
    "dict": lambda: (Net(nn.Linear(4, 3), lambda b: b["x"]), {"x": torch.randn(6, 4), "id": torch.arange(6)}),
    "user dict": lambda: (Net(nn.Linear(4, 3), lambda b: b["x"]), UserDict(x=torch.randn(6, 4))),
    "nested": lambda: (
        Net(nn.Linear(4, 3), lambda b: b[0]["x"][1]),
        ({"x": [torch.zeros(6), torch.randn(6, 4)]}, torch.arange(6), None, "name"),
    ),
    "named tuple": lambda: (Net(nn.Linear(4, 3), lambda b: b.second), Pair(torch.zeros(6, 1), torch.randn(6, 4))),
    "dataclass": lambda: (Net(nn.Linear(4, 3), lambda b: b.x), Record(torch.randn(6, 4))),
}


def example(batch, row):
    return map_tensors(batch, lambda tensor: tensor[row : row + 1])


def reference(module, batch, size, names):
    """One example, one backward pass, in float64."""
    module = copy.deepcopy(module).double().eval()
    for name, buffer in module.named_buffers():
        assert buffer.dtype != torch.float32, name
    parameters = dict(module.named_parameters())
    outputs, rows = [], []
    for row in range(size):
        one = map_tensors(example(batch, row), lambda t: t.double() if t.is_floating_point() else t)
        output = module.model_output(one)
        module.zero_grad()
        output.sum().backward()
        gradients = [parameters[name].grad for name in names]
        flat = [torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, gradients, strict=True)]
        rows.append(torch.cat([gradient.flatten() for gradient in flat]))
        outputs.append(output.detach())
    return torch.cat(outputs).numpy(), torch.stack(rows).numpy()


def collect(engine, function, batch, size):
    """Run an engine, and add up what it sends."""
    shapes = {name: value.shape for name, value in function.parameters.items()}
    found = {name: torch.zeros(size, *shape) for name, shape in shapes.items()}

    def sink(rows, name, gradient):
        dense = gradient.dense()
        assert not dense.requires_grad
        assert dense.shape == (gradient.size, *gradient.shape) == found[name][rows].shape
        found[name][rows] += dense

    outputs = engine(function, batch, size, sink)
    assert not outputs.requires_grad
    return outputs, torch.cat([value.unsqueeze(-1).flatten(1) for value in found.values()], 1)


def run(module, batch, size, names, engine):
    function = ModelFunction(module, module.state_dict(), names)
    if engine != "loop":
        chosen = ENGINES[engine]()
        chosen.prepare(function, map_tensors(batch, lambda tensor: tensor[:4]), min(size, 4))
        return collect(chosen, function, batch, size)
    parts = [collect(LoopEngine(), function, example(batch, row), 1) for row in range(size)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("selected", ["all", "first"])
def test_engines_against_the_reference(case, engine, selected):
    torch.manual_seed(0)
    module, batch = CASES[case]()
    module.eval()
    names = [name for name, _ in module.named_parameters()]
    names = names if selected == "all" else names[:1]
    outputs, gradients = run(module, batch, 6, names, engine)
    expected_outputs, expected = reference(module, batch, 6, names)
    np.testing.assert_allclose(outputs.numpy(), expected_outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients.numpy(), expected, rtol=1e-3, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_shapes_and_chunks(size, width, depth, chunked):
    torch.manual_seed(size)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    module, batch = Net(net).eval(), torch.randn(size, width)
    names = [name for name, _ in module.named_parameters()]
    function = ModelFunction(module, module.state_dict(), names)
    _, gradients = collect(VmapEngine(1) if chunked else VmapEngine(), function, batch, size)
    if size:
        np.testing.assert_allclose(gradients.numpy(), reference(module, batch, size, names)[1], rtol=1e-3, atol=1e-5)
    assert gradients.shape[0] == size


@pytest.mark.parametrize("projector", ["identity", "sparse", "rademacher"])
@pytest.mark.parametrize("engine", [HooksEngine, VmapEngine, LoopEngine])
def test_features_are_gradients_times_the_projection(projector, engine):
    torch.manual_seed(0)
    module, batch = Net(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))).eval(), torch.randn(6, 4)
    names = [name for name, _ in module.named_parameters()]
    function = ModelFunction(module, module.state_dict(), names)
    projector = make_projector(projector, 12, function.n_params)
    engine = engine()
    engine.prepare(function, batch[:4], 4)
    featurize = Featurizer(function, engine, projector, key=5)
    matrix = torch.zeros(function.n_params, projector.dimension(function.n_params))
    projector.add_(matrix, torch.eye(function.n_params), 0, 5)
    outputs, gradients = reference(module, batch, 6, names)
    expected = gradients @ matrix.double().numpy()
    sizes = [1] * 6 if engine.batch_size == 1 else [6]
    parts = [featurize(part, len(part)) for part in batch.split(sizes)]
    np.testing.assert_allclose(torch.cat([part.features for part in parts]).numpy(), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(torch.cat([part.outputs for part in parts]).numpy(), outputs, rtol=1e-4, atol=1e-5)
    for row in range(6):
        check_gradients(function, engine, batch[row : row + 1], 1)
    if engine.batch_size is None:  # any split and any order
        order = torch.randperm(6)
        again = torch.cat([featurize(part, len(part)).features for part in batch[order].split(4)])
        np.testing.assert_allclose(again.numpy(), expected[order], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("net", "batch", "reason"),
    [
        (nn.Linear(4, 3), {"x": torch.randn(6, 4), "shared": torch.zeros(2)}, "not every tensor of the batch has 6"),
        (nn.Linear(4, 3), {"x": torch.randn(6, 4), "scalar": torch.tensor(1.0)}, "not every tensor"),
        (lambda x: x * x.sum().item(), {"x": torch.randn(6, 4)}, "vmap failed with RuntimeError"),
        (lambda x: F.dropout(x), {"x": torch.randn(6, 4)}, "alone differs"),
        (lambda x: x - x.mean(0), {"x": torch.randn(6, 4)}, "alone differs"),
    ],
)
def test_what_vmap_cannot_do_is_said(net, batch, reason):
    module = Net(nn.Linear(4, 3) if isinstance(net, nn.Module) else Wrapped(net), lambda b: b["x"]).eval()
    function = ModelFunction(module, module.state_dict(), [name for name, _ in module.named_parameters()])
    with pytest.raises(EngineUnsuitable, match=reason):
        VmapEngine()(function, batch, 6, lambda *_: None)


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.linear(x))


def test_the_module_itself_is_not_touched():
    module = Net(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    module.net[0].weight.grad = torch.ones(3, 4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weights = {name: value + 1 for name, value in before.items()}
    function = ModelFunction(module, weights, ["net.0.weight"])
    module.train()  # batch statistics move, but those of the checkpoint
    function.output(torch.randn(6, 4))
    batch_gradient(function, torch.randn(6, 4))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module.net[0].weight.grad, torch.ones(3, 4))
    assert module.net[0].bias.grad is None


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


RECURRENT = [(kind, engine) for kind in (nn.LSTM, nn.GRU, nn.RNN) for engine in ("hooks", "loop")] + [(nn.LSTM, "vmap")]


@pytest.mark.parametrize(("kind", "engine"), RECURRENT)  # vmap takes no other
@pytest.mark.parametrize("selected", ["", "head"])
def test_recurrent_layers_take_the_checkpoints_weights_every_time(kind, selected, engine):
    """They keep a list of their weights. The second call took those of the module, and gave them gradients."""
    torch.manual_seed(0)
    module, trained = Net(Recurrent(kind)).eval(), Net(Recurrent(kind)).eval()
    names, batch = [name for name, _ in module.named_parameters() if selected in name], torch.randn(4, 5, 4)
    function = ModelFunction(module, trained.state_dict(), names)
    expected_outputs, expected = reference(trained, batch, 4, names)
    for _ in range(2):
        np.testing.assert_allclose(function.output(batch).detach().numpy(), expected_outputs, rtol=1e-4, atol=1e-6)
        chosen = ENGINES[engine]()
        chosen.prepare(function, batch, 4)
        outputs, gradients = collect(chosen, function, batch, 4)
        np.testing.assert_allclose(outputs.numpy(), expected_outputs, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gradients.numpy(), expected, rtol=1e-3, atol=1e-5)
    assert all(value.grad is None for value in module.parameters())
    layer = module.net.layer
    listed = zip(layer._flat_weights_names, layer._flat_weights, strict=True)
    assert all(getattr(layer, name) is value for name, value in listed)


def test_activation_checkpointing_recomputes_with_the_checkpoints_weights():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    plain, batch = Net(inner), torch.randn(3, 4)
    weights = {name: torch.randn_like(value) for name, value in plain.state_dict().items()}  # not the live ones
    names = list(weights)
    recomputing = Net(inner)
    recomputing.model_output = lambda b: checkpoint(lambda x: Net.model_output(plain, x), b, use_reentrant=False)
    _, expected = batch_gradient(ModelFunction(plain, weights, names), batch)
    _, got = batch_gradient(ModelFunction(recomputing, weights, names), batch)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_evaluated_at_the_checkpoints_weights_every_time(kind):
    torch.manual_seed(0)
    module, batch = kind(3, 2, batch_first=True), torch.randn(4, 5, 3)
    module.model_output = lambda x: module(x)[0].sum((1, 2))
    trained = copy.deepcopy(module.state_dict())
    function = ModelFunction(module, {name: value + 1 for name, value in trained.items()}, ["weight_ih_l0"])
    found = [function.output(batch) for _ in range(3)]
    module.load_state_dict({name: value + 1 for name, value in trained.items()})
    for output in found:  # kernels for training and for inference may round differently
        torch.testing.assert_close(output, module.model_output(batch).detach())


@pytest.mark.parametrize("hide", ["list", "dict", "attribute", "module"])
def test_a_parameter_held_elsewhere_is_the_checkpoints_too(hide):
    torch.manual_seed(0)
    module, other, batch = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), torch.randn(4, 3)
    other.weight = module.weight
    module.held = {"list": [module.weight], "dict": {0: [module.weight]}, "module": [other], "attribute": None}[hide]
    if hide == "attribute":
        vars(module)["held"] = module.weight

    def held():
        found = {"list": lambda: module.held[0], "dict": lambda: module.held[0][0], "attribute": lambda: module.held}
        return module.held[0].weight if hide == "module" else found[hide]()

    module.model_output = lambda x: (module(x).tanh() @ held()).sum(1)
    weights = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    function = ModelFunction(module, weights, ["weight"])
    outputs, (gradient,) = batch_gradient(function, batch)
    assert module.weight.grad is None
    weight = weights["weight"].requires_grad_()
    expected = (F.linear(batch, weight, weights["bias"]).tanh() @ weight).sum(1)
    expected.sum().backward()
    torch.testing.assert_close(outputs, expected.detach())
    torch.testing.assert_close(gradient, weight.grad)
    assert held() is module.weight


def test_buffers_changed_in_place_are_copies():
    class Counts(Net):
        def __init__(self):
            super().__init__(nn.Linear(4, 3))
            self.register_buffer("calls", torch.zeros(1), persistent=False)
            self.register_buffer("kept", torch.zeros(1))

        def model_output(self, batch):
            self.calls += 1
            self.kept += 1
            return super().model_output(batch)

    module = Counts()
    weights = module.state_dict()
    ModelFunction(module, weights, ["net.weight"]).output(torch.randn(2, 4))
    assert module.calls.item() == module.kept.item() == weights["kept"].item() == 0


def test_weights_that_do_not_fit():
    module = Net(nn.Linear(4, 3))
    good = module.state_dict()
    with pytest.raises(ValueError, match=r"missing: net\.bias"):
        ModelFunction(module, {"net.weight": good["net.weight"]}, ["net.weight"])
    with pytest.raises(ValueError, match="unexpected: other"):
        ModelFunction(module, {**good, "other": torch.zeros(1)}, ["net.weight"])
    with pytest.raises(ValueError, match=r"net\.bias: shape \(4,\) in the checkpoint, \(3,\) in the model"):
        ModelFunction(module, {**good, "net.bias": torch.zeros(4)}, ["net.weight"])
    module.strict_loading = False
    ModelFunction(module, {"net.weight": good["net.weight"]}, ["net.weight"])


def test_outputs_of_a_wrong_form():
    module = Net(nn.Linear(4, 3))
    for wrong, message in (
        (lambda b: b, r"shape \(6, 4\)"),
        (lambda b: b.sum(), r"shape \(\)"),
        (lambda b: 1.0, "float"),
    ):
        module.model_output = wrong
        with pytest.raises(ValueError, match=rf"returned .*{message}.*shape \(b,\)"):
            ModelFunction(module, module.state_dict(), ["net.weight"]).output(torch.randn(6, 4))


def test_the_loop_cuts_batches_into_rows_where_it_can():
    torch.manual_seed(0)
    module, batch = Net(nn.Linear(4, 3)).eval(), torch.randn(3, 4)
    names = ["net.weight", "net.bias"]
    function = ModelFunction(module, module.state_dict(), names)
    _, gradients = collect(LoopEngine(), function, batch, 3)
    np.testing.assert_allclose(gradients.numpy(), reference(module, batch, 3, names)[1], rtol=1e-3, atol=1e-5)
    module.inputs = lambda b: b["x"]
    with pytest.raises(EngineUnsuitable, match="not every tensor of the batch has 3 rows"):
        LoopEngine()(function, {"x": batch, "shared": torch.zeros(2)}, 3, lambda *_: None)
    module.inputs = lambda b: b - b.mean(0)
    with pytest.raises(EngineUnsuitable, match="alone differs"):
        LoopEngine()(function, batch, 3, lambda *_: None)


class Remembering(nn.Module):
    """Has a weight for every example of the train set, and takes that of the example in hand."""

    example_numbers = None

    def __init__(self):
        super().__init__()
        self.scale, self.offsets = nn.Linear(1, 1, bias=False), torch.arange(10.0)

    def model_output(self, batch):
        assert isinstance(batch, dict)
        x = batch.pop("x")
        return self.scale(x * (self.offsets[self.example_numbers])[:, None]).squeeze(1)


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_numbers_of_examples_go_with_them(engine):
    module, numbers = Remembering(), torch.tensor([7, 2, 2, 0, 9])
    batch = NumberedBatch({"x": torch.randn(5, 1)}, numbers)
    function = ModelFunction(module, module.state_dict(), ["scale.weight"])
    chosen = ENGINES[engine]()
    chosen.prepare(function, batch, 5)
    featurizer = Featurizer(function, chosen, make_projector("identity", 1, 1), key=0)
    for part in (slice(0, 5), slice(3, 5), slice(1, 2)):
        one = map_tensors(batch, lambda tensor, part=part: tensor[part])
        check_gradients(function, chosen, one, len(one.numbers))
        result = featurizer(one, len(one.numbers))
        expected = batch.batch["x"][part] * numbers[part, None]
        torch.testing.assert_close(result.features, expected)
        torch.testing.assert_close(result.outputs, (expected @ module.scale.weight.T)[:, 0].detach())
    assert module.example_numbers is None
    assert describe(batch) == "dict(x: Tensor(5, 1))"


def test_batch_structures():
    batch = {"a": [torch.zeros(2)], "b": Pair(torch.ones(2), "text"), "c": Record(torch.ones(1)), "d": None}
    assert [len(tensor) for tensor in tensors_of(batch)] == [2, 2, 1]
    replaced = with_tensors(batch, [torch.tensor([i]) for i in range(3)])
    assert isinstance(replaced["b"], Pair)
    assert (replaced["b"].first.item(), replaced["c"].x.item(), replaced["c"].note) == (1, 2, "kept")
    graphs = Graphs([torch.ones(2), torch.zeros(1)])
    (nodes,) = tensors_of(graphs)
    assert (nodes.tolist(), map_tensors(graphs, len).nodes, graphs.nodes is nodes) == ([1, 1, 0], 3, True)
    assert isinstance(map_tensors(UserDict(x=torch.ones(1)), len), UserDict)
    assert map_tensors(defaultdict(list, x=torch.ones(3)), len) == {"x": 3}
    assert (
        describe(batch)
        == "dict(a: list(Tensor(2,)), b: Pair(Tensor(2,), str), c: Record(x: Tensor(1,), note: str), d: NoneType)"
    )


@dataclass(frozen=True)
class Derived:
    """Made of more, or of less, than its fields."""

    x: torch.Tensor
    scale: InitVar[float]
    y: torch.Tensor = field(init=False)

    def __post_init__(self, scale):
        object.__setattr__(self, "y", self.x * scale)


def test_dataclasses_that_cannot_be_made_from_their_fields():
    batch = Derived(torch.ones(4, 2), 3.0)
    found = map_tensors(batch, lambda tensor: tensor[:1])
    assert isinstance(found, Derived)
    assert (found.x.tolist(), found.y.tolist()) == ([[1, 1]], [[3, 3]])
    assert len(batch.x) == len(batch.y) == 4
    assert describe(batch) == "Derived(x: Tensor(4, 2), y: Tensor(4, 2))"
    assert len(tensors_of(batch)) == 2
