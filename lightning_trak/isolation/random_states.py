"""Restore random generators: the global ones, and those that a module, a dataset or a function holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lightning_trak.isolation.reach import reached

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Afterwards, restore the global generators: Python's, NumPy's, and torch's on every device.

    Lightning's ``isolate_rng`` is not enough: it restores nothing after an error, and leaves out XPU and MPS.

    >>> with kept_random_states():
    ...     inside = random.random()
    >>> random.random() == inside
    True
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    devices: list[tuple[Callable[[Any], object], Any]] = [
        (backend.set_rng_state_all, backend.get_rng_state_all())
        for backend in (torch.cuda, torch.xpu)
        if backend.is_available()
    ]
    if torch.backends.mps.is_available():
        devices.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for put_back, state in devices:
            put_back(state)


@contextmanager
def kept_generators(*owners: Any) -> Iterator[None]:
    """Afterwards, restore all generators that some objects hold.

    Global generators are not among them; see `kept_random_states`. See `reached` for where they are searched.

    >>> owner = {"generator": np.random.default_rng(0)}
    >>> with kept_generators(owner):
    ...     inside = owner["generator"].random()
    >>> owner["generator"].random() == inside
    True
    """
    found = [(held, _state(held)) for _, held in reached(*owners) if isinstance(held, _GENERATORS)]
    try:
        yield
    finally:
        for generator, state in found:
            _set_state(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def seed_all(seed: int) -> None:
    """Seed the global generators, from which datasets draw their augmentations."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond, to format a stack trace
    if torch.cuda.is_initialized() or torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - augmentations use the global generator
    random.seed(seed)
