"""The invariant: a module is the same before and after, whatever is done with it; what is not is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_trak.module_state import ModuleChanged, ModuleState, unchanged


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
