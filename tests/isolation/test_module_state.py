"""The invariant: a module is the same before and after, whatever is done with it; what is not is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_trak.isolation.module_state import ModuleChanged, ModuleState, others_frozen, unchanged


def module():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    net[0].weight.grad = torch.ones(3, 2)
    return net


def replace_parameter(net):
    net[0].weight = nn.Parameter(torch.zeros(3, 2))


def make_plain_tensor(net):
    net[0]._parameters["weight"] = torch.zeros(3, 2)


def remove_parameter(net):
    del net[2].bias


def replace_buffer(net):
    net[1].running_mean = torch.ones(3)


def add_buffer(net):
    net[1].register_buffer("more", torch.ones(3))


def freeze(net):
    net[2].requires_grad_(False)


def replace_gradient(net):
    net[0].weight.grad = torch.zeros(3, 2)


def drop_gradient(net):
    net.zero_grad()


def add_hook(net):
    net[1].register_forward_hook(lambda *_: None)


def add_tensor_hook(net):
    net[2].weight.register_hook(lambda grad: grad)


def add_gradient_hook(net):
    net[2].weight.register_post_accumulate_grad_hook(lambda value: None)


def replace_module(net):
    net[1] = nn.Identity()


UNDONE = {
    replace_parameter: "0.weight is another object",
    make_plain_tensor: "0.weight is another object",
    remove_parameter: "2.bias is another object",
    replace_buffer: "1.running_mean is another object",
    add_buffer: "1.more is another object",
    freeze: "requires_grad of 2.weight is False",
    replace_gradient: "the gradient of 0.weight is another one",
    drop_gradient: "the gradient of 0.weight is another one",
    add_hook: "1 has other hooks",
    add_tensor_hook: "2.weight has other hooks",
    add_gradient_hook: "2.weight has other hooks",
    replace_module: "the module has other submodules",
}


def snapshot(net):
    """Everything the invariant speaks of, collected in another way."""
    return (
        [(name, id(value), value.requires_grad, value.tolist()) for name, value in net.named_parameters()],
        [(name, id(value), value.tolist()) for name, value in net.named_buffers()],
        [(name, id(part), part.training, list(part._forward_hooks)) for name, part in net.named_modules()],
        [None if value.grad is None else (id(value.grad), value.grad.tolist()) for value in net.parameters()],
        [list(value._backward_hooks or ()) for value in net.parameters()],
        [list(value._post_accumulate_grad_hooks or ()) for value in net.parameters()],
    )


@pytest.mark.parametrize("change", UNDONE)
def test_what_must_not_change_is_put_back_and_named(change):
    net = module()
    before = snapshot(net)
    with pytest.raises(ModuleChanged, match=UNDONE[change]) as raised, unchanged(net):
        change(net)
    assert raised.value.restored
    assert snapshot(net) == before


@pytest.mark.parametrize("change", UNDONE)
def test_it_is_put_back_after_an_error_too_and_the_error_stays(change):
    net = module()
    before = snapshot(net)

    def fail():
        change(net)
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"), unchanged(net):
        fail()
    assert snapshot(net) == before


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_other_values_cannot_be_undone(what, failing):
    net = module()

    def change():
        (net[0].weight.grad if what == "gradient" else net[0].weight).detach().add_(1)
        if failing:
            raise KeyError("of the user")

    with pytest.raises(ModuleChanged, match=r"0.weight has other values.*cannot be undone") as raised, unchanged(net):
        change()
    assert not raised.value.restored


def test_what_a_forward_pass_may_leave_behind_is_put_back_without_mention():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.seen, self.counts = 0, [], torch.zeros(2)
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            self.calls += 1
            self.seen.append(x)
            self.last = x
            self.counts += 1
            self.mean.add_(1)

    net = nn.Sequential(Counting())
    seen, counts, mean = net[0].seen, net[0].counts, net[0].mean
    with unchanged(net):
        net.eval()
        net(torch.ones(2))
    assert net.training
    assert (net[0].calls, net[0].seen, hasattr(net[0], "last")) == (0, [], False)
    assert net[0].seen is seen
    assert net[0].counts is counts
    assert net[0].mean is mean
    assert not counts.any()
    assert not mean.any()


def test_optimizers_hold_the_same_parameters():
    net = module()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with pytest.raises(ModuleChanged, match="the optimizer holds other parameters"), unchanged(net, [optimizer]):
        optimizer.param_groups[0]["params"].pop()
    assert [id(value) for value in optimizer.param_groups[0]["params"]] == [id(value) for value in net.parameters()]


def test_lazy_modules_and_inference_tensors_pass():
    net = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with torch.inference_mode():
        net.count = torch.zeros(1)
    state = ModuleState(net)
    assert state.restore() == []


class Meter:
    def __init__(self):
        self.total, self.seen = 0, [[], {}]


def test_what_is_held_in_objects_nested_containers_and_closures_is_put_back():
    net, counts = module(), []
    net.meter, net.sums, net.array = Meter(), {"a": [torch.zeros(2)]}, np.zeros(2)
    net.meter.net = net  # a circle
    net[0].register_forward_hook(lambda *_: counts.append(1))
    seen, tensor, array = net.meter.seen, net.sums["a"][0], net.array
    with unchanged(net):
        net(torch.ones(2, 2))
        net.meter.total, net.meter.last = 5, 1
        net.meter.seen[0].append(1)
        net.meter.seen[1]["b"] = 1
        net.sums["a"].append(1)
        tensor += 1
        array += 1
    assert (vars(net.meter), net.meter.seen) == ({"total": 0, "seen": seen, "net": net}, [[], {}])
    assert net.sums["a"] == [tensor]
    assert not tensor.any()
    assert not array.any()
    assert counts == []


def hidden_in(net, way):
    """Let a module hold another that it does not register."""
    part = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Embedding(2, 2, max_norm=0.1))
    holder = Meter()
    holder.part = part
    net.held = {"list": [part], "nested": {"a": [(part,)]}, "object": holder}[way]
    return part


WAYS = ["list", "nested", "object"]


@pytest.mark.parametrize("way", WAYS)
def test_modules_that_are_not_registered_are_covered(way):
    net = module()
    part = hidden_in(net, way)
    before = snapshot(part)
    with unchanged(net):  # what a forward pass may do
        part[:2](torch.randn(3, 2))
        part[2](torch.tensor([0, 1]))
        part[1].running_mean = torch.ones(2)
        part.eval()
    assert snapshot(part) == before
    with pytest.raises(ModuleChanged, match=r"requires_grad of held.*0.weight is False"), unchanged(net):
        part[0].weight.requires_grad_(False)
    assert snapshot(part) == before


@pytest.mark.parametrize("way", WAYS)
def test_no_gradient_reaches_them(way):
    net, elsewhere = module(), nn.Parameter(torch.ones(2))
    part = hidden_in(net, way)
    optimizer = torch.optim.SGD([*net.parameters(), elsewhere], lr=1.0)
    with unchanged(net, [optimizer]), others_frozen(net, [optimizer]):
        leaf = torch.ones(3, 2, requires_grad=True)
        part[0](leaf * elsewhere).sum().backward()
    assert leaf.grad is not None
    assert all(value.grad is None and value.requires_grad for value in (*part.parameters(), elsewhere))


def test_parameters_of_other_modules_that_the_optimizer_holds_are_covered():
    net, elsewhere = module(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*net.parameters(), elsewhere], lr=1.0)
    with pytest.raises(ModuleChanged, match="gradient of parameter 6 of the optimizers"), unchanged(net, [optimizer]):
        elsewhere.sum().backward()
    assert elsewhere.grad is None
