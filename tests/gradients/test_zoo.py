"""Published architectures: what the hook engine yields against one backward pass for each example."""

from __future__ import annotations

import pytest
import torch

from lightning_trak.data.batch import map_tensors
from lightning_trak.gradients import EngineUnsuitable, HooksEngine, LoopEngine, ModelFunction
from tests.gradients.zoo import ZOO

SIZE = 5

LEFT_TO_OTHERS = {  # parameters that hooks cannot reach; every other architecture has none
    "lstm_packed": "loop for 16 of 19 parameters",
    "hf_t5": "loop for 2 of 47 parameters",
    "hf_swin": "vmap for 4 of 79 parameters",
}


def collect(engine, function, batch):
    found = {name: torch.zeros(SIZE, *value.shape) for name, value in function.parameters.items()}

    def sink(rows, name, gradient):
        found[name][rows] += gradient.dense()

    return engine(function, batch, SIZE, sink), found


def at_its_weights(module, names):
    """Return the module as a function of its weights, and spoil those that it has itself: they are not to be read."""
    function = ModelFunction(module, {name: value.clone() for name, value in module.state_dict().items()}, names)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    return function


def compare(name):
    """Return the engine chosen, and the largest difference of any parameter's gradients, relative to all of them."""
    module, make_batch = ZOO[name]()
    batch = make_batch(SIZE)
    function = at_its_weights(module, [name for name, _ in module.named_parameters()])
    engine = HooksEngine()
    engine.prepare(function, map_tensors(batch, lambda tensor: tensor[:4]), 4)
    outputs, found = collect(engine, function, batch)
    expected_outputs, expected = collect(LoopEngine(), function, batch)
    assert torch.allclose(outputs, expected_outputs, atol=1e-4)
    norm = sum(value.square().sum() for value in expected.values()) ** 0.5
    worst = max(((found[name] - expected[name]).norm() / norm).item() for name in expected)
    return engine, worst


@pytest.mark.parametrize("name", ZOO)
def test_hooks_agree_with_the_loop(name):
    engine, worst = compare(name)
    assert worst < 1e-5
    assert LEFT_TO_OTHERS.get(name, "") in str(engine)
    assert (engine._others is None) == (name not in LEFT_TO_OTHERS)


def test_the_zoo_is_whole():
    assert len(ZOO) >= 25
    assert sum(name.startswith("hf_") for name in ZOO) >= 15


@pytest.mark.parametrize(("model", "part"), [("hf_bert", "query"), ("lstm", "head"), ("gru", "embedding")])
def test_only_selected_parameters_are_computed(model, part):
    module, make_batch = ZOO[model]()
    names = [name for name, _ in module.named_parameters() if part in name]
    function = at_its_weights(module, names)
    engine, batch = HooksEngine(), make_batch(SIZE)
    engine.prepare(function, map_tensors(batch, lambda tensor: tensor[:4]), 4)
    assert {name for layer in engine._layers for name in layer.parameters.values()} == set(names)
    _, found = collect(engine, function, batch)
    _, expected = collect(LoopEngine(), function, batch)
    assert found.keys() == expected.keys() == set(names)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in names)
    assert all(value.grad is None for value in module.parameters())


def test_a_model_without_layers_is_left_to_the_other_engines():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def model_output(self, batch):
            return batch @ self.weight

    module = Bare()
    function = ModelFunction(module, module.state_dict(), ["weight"])
    with pytest.raises(EngineUnsuitable, match="no parameter is left to hooks; e.g. weight: used outside its module"):
        HooksEngine().prepare(function, torch.randn(4, 3), 4)
