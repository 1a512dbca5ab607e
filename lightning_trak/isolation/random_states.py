"""Restore random generators: the global ones, and those that a module, a dataset or a function holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
    put_back: list[Callable[[], object]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    devices = [backend for backend in (torch.cuda, torch.xpu) if backend.is_available()]
    put_back += [partial(backend.set_rng_state_all, backend.get_rng_state_all()) for backend in devices]
    if torch.backends.mps.is_available():
        put_back.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        for one in put_back:
            one()


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
    put_back = [_to_put_back(held) for _, held in reached(*owners) if isinstance(held, _GENERATORS)]
    try:
        yield
    finally:
        for one in put_back:
            one()


def _to_put_back(generator: Any) -> Callable[[], object]:
    """Return a function that restores the present state of a generator."""
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


def seed_all(seed: int) -> None:
    """Seed the global generators, from which datasets draw their augmentations."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond, to format a stack trace
    if torch.cuda.is_initialized() or torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - augmentations use the global generator
    random.seed(seed)
