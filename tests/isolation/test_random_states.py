"""The global random generators, put back: against stand-ins for devices that are not there, and on a GPU that is."""

from __future__ import annotations

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lightning_trak.evaluation.retraining import seeded
from lightning_trak.isolation.random_states import kept_random_states


class Device:
    """Takes the place of the generators of two devices: a state, which seeding and drawing change."""

    def __init__(self):
        self.states = [torch.tensor([5], dtype=torch.uint8), torch.tensor([6], dtype=torch.uint8)]

    def get_all(self):
        return [state.clone() for state in self.states]

    def set_all(self, states):
        self.states = [state.clone() for state in states]

    def seed(self, seed):
        self.states = [torch.tensor([seed % 200], dtype=torch.uint8) for _ in self.states]

    def numbers(self):
        return [int(state) for state in self.states]


def stand_in(monkeypatch, kind):
    """Let torch see two CUDA or XPU devices, or one of MPS, whose generators are a `Device`."""
    device, backend = Device(), getattr(torch, kind)
    if kind == "mps":
        device.states = device.states[:1]
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(backend, "get_rng_state", lambda: device.get_all()[0])
        monkeypatch.setattr(backend, "set_rng_state", lambda state: device.set_all([state]))
        monkeypatch.setattr(backend, "manual_seed", device.seed)
        monkeypatch.setattr(backend, "_is_in_bad_fork", lambda: False)
        return device
    monkeypatch.setattr(backend, "is_available", lambda: True)
    monkeypatch.setattr(backend, "is_initialized", lambda: True)
    monkeypatch.setattr(backend, "_is_in_bad_fork", lambda: False)
    monkeypatch.setattr(backend, "get_rng_state_all", device.get_all)
    monkeypatch.setattr(backend, "set_rng_state_all", device.set_all)
    monkeypatch.setattr(backend, "manual_seed_all", device.seed)
    return device


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
@pytest.mark.parametrize("failing", [False, True])
def test_states_of_devices_are_put_back(monkeypatch, kind, failing):
    device = stand_in(monkeypatch, kind)
    before = device.numbers()
    with pytest.raises(KeyError) if failing else nullcontext(), seeded(7):
        assert set(device.numbers()) == {7}  # a run depends on its seed alone
        device.seed(8)  # as drawing does
        if failing:
            raise KeyError
    assert device.numbers() == before


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("context", [lambda: seeded(7), kept_random_states])
def test_states_are_put_back(context, failing):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()

    with kept_random_states():
        expected = draw()
    with pytest.raises(KeyError) if failing else nullcontext(), context():
        draw()
        if failing:
            raise KeyError
    assert draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_are_put_back_on_a_gpu():
    before = torch.cuda.get_rng_state_all()
    with seeded(7):
        first = torch.rand(3, device="cuda")
    assert all(torch.equal(one, other) for one, other in zip(torch.cuda.get_rng_state_all(), before, strict=True))
    with seeded(7):
        assert torch.equal(torch.rand(3, device="cuda"), first)
