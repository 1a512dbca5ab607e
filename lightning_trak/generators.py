"""Random generators, the global ones and those that a module, a dataset or a function holds: found, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DEEPEST = 6  # attributes of attributes: a transform in a list of a Compose of a dataset of a Subset
_MOST = 1000  # entries of a container, and objects in all: data are not searched
_PASSED_OVER = (str, bytes, int, float, complex, type(None), type, ModuleType, Tensor, np.ndarray)
_ELSEWHERE = ("trainer", "_trainer", "_fabric")  # of a LightningModule: they lead to everything


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Put the states of the global generators back afterwards: Python's, NumPy's, and torch's of every device.

    ``isolate_rng`` of Lightning does not do: it puts nothing back when an error passes through it, and leaves out the
    generators of XPU and MPS.

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
    """Put the states of all generators that some objects hold back afterwards.

    Global generators are not among them; see `kept_random_states`.

    >>> owner = {"generator": np.random.default_rng(0)}
    >>> with kept_generators(owner):
    ...     inside = owner["generator"].random()
    >>> owner["generator"].random() == inside
    True
    """
    found = [(generator, _state(generator)) for generator in generators_in(*owners)]
    try:
        yield
    finally:
        for generator, state in found:
            _set_state(generator, state)


def generators_in(*owners: Any) -> list[Any]:
    """List the generators of torch, NumPy and ``random`` that are reached from some objects, each once.

    Attributes, containers, closures, bound methods and arguments of ``partial`` are followed, not too deep.
    """
    seen: dict[int, Any] = {}
    return list(_search(list(owners), _DEEPEST, seen))


def _search(objects: list[Any], depth: int, seen: dict[int, Any]) -> Iterator[Any]:
    for value in objects:
        if isinstance(value, _PASSED_OVER) or id(value) in seen or len(seen) >= _MOST:
            continue
        seen[id(value)] = value  # held, so that no other object gets its number
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            yield value
        elif depth:
            yield from _search(_within(value), depth - 1, seen)


def _within(value: Any) -> list[Any]:
    """Return the objects that an object holds."""
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= _MOST else []
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value) if len(value) <= _MOST else []
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    attributes = getattr(value, "__dict__", {})
    return [held for name, held in attributes.items() if name not in _ELSEWHERE]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading it is the test
    except ValueError:
        return False
    return True


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
