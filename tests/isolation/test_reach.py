"""What is found around a module, and what is left alone."""

from __future__ import annotations

import queue
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_trak.isolation.reach import attributes_of, reached


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def method_of(target):
    class Bound:
        def __init__(self):
            self.target = target

        def call(self):
            return self.target

    return Bound().call


WAYS = {
    "list": lambda target: [target],
    "nested": lambda target: {"a": [(target, 1)]},
    "set": lambda target: {target},
    "object": lambda target: Holder(held=Holder(held=target)),
    "closure": lambda target: lambda: target,
    "method": method_of,
    "partial": lambda target: partial(print, target),
}


@pytest.mark.parametrize("deep", [0, 12])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_found(way, deep):
    net, target = nn.Linear(1, 1), nn.BatchNorm1d(1)
    net.held = WAYS[way](target)
    for _ in range(deep):  # however deep a module is
        net = nn.Sequential(net)
    found = [value for _, value in reached(net)]
    assert sum(value is target for value in found) == 1
    assert sum(value is target.running_mean for value in found) == 1


def test_many_modules_and_parameters_are_found():
    net = nn.Sequential(*(nn.Identity() for _ in range(1500)), nn.ParameterList(torch.ones(1) for _ in range(1500)))
    net.last = [torch.ones(1)]
    found = {id(value) for _, value in reached(net)}
    assert {id(value) for value in (*net.modules(), *net.parameters(), net.last[0])} <= found


def test_names_say_the_way_and_circles_end():
    net = nn.Sequential(nn.Linear(1, 1))
    net[0].holder = Holder(net=net, values={"a": [torch.ones(1)]})
    names = [name for name, value in reached(net) if isinstance(value, torch.Tensor)]
    assert names == ["0.weight", "0.bias", "0.holder.values['a'][0]"]


@pytest.mark.parametrize(
    "stranger",
    [
        Holder(lock=threading.Lock(), items=[Holder()]),
        Holder(waiting=queue.Queue(), items=[Holder()]),
        SimpleNamespace(items=[Holder()]),
    ],
)
def test_objects_of_threads_and_of_the_standard_library_are_not_entered(stranger):
    net = nn.Linear(1, 1)
    net.stranger = stranger
    assert attributes_of(stranger) is None
    assert not any(value is stranger.items for _, value in reached(net))


def test_data_and_the_trainer_are_not_searched():
    net, target = nn.Linear(1, 1), nn.ReLU()
    net.data, net._trainer, net.trainer = [target, *range(1000)], Holder(held=target), [target]
    assert not any(value is target for _, value in reached(net))
