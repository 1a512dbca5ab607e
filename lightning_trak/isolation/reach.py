"""Find what a module, a dataset or a function holds: in attributes, containers and closures."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_DEEPEST = 6  # steps from the nearest module, or from the start of the search
_MOST = 1000  # entries of a container, and objects searched from one module: what is larger is data
_PASSED_OVER = (str, bytes, int, float, complex, type(None), type, ModuleType)
_ELSEWHERE = ("trainer", "_trainer", "_fabric")  # attributes that lead from a LightningModule to everything
_COMPILER = ("torch._dynamo", "torch._inductor", "torch._functorch")
_OF_THREADS = ("threading", "_thread", "queue", "_queue", "multiprocessing", "asyncio", "concurrent")


def reached(*owners: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, object) for some objects and all that they hold: each once, the nearest first.

    All registered modules are found, at any depth, and what each of them holds. Numbers and strings are left out. The
    search does not enter objects of the standard library, of compilers, or those that several threads use.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.teachers = {"a": [nn.ReLU()]}
    >>> [name for name, value in reached(layer) if isinstance(value, (Tensor, nn.Module))]
    ['', 'weight', "teachers['a'][0]"]
    """
    seen: dict[int, Any] = {}
    begins = (owner for owner in owners if not isinstance(owner, _PASSED_OVER))
    waiting = deque(entry for owner in begins for entry in _begin("", owner))
    while waiting:
        name, value, depth, left = waiting.popleft()
        if id(value) in seen or depth > _DEEPEST:
            continue
        if isinstance(value, nn.Module) and depth:
            waiting.extend(_begin(name, value))
            continue
        if not isinstance(value, nn.Parameter):
            left[0] -= 1
            if left[0] < 0:
                continue
        seen[id(value)] = value  # keeps it alive, so that no other object gets its id
        yield name, value
        steps = ((step, held) for step, held in _within(value) if not isinstance(held, _PASSED_OVER))
        waiting.extend((_joined(name, step), held, depth + 1, left) for step, held in steps)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object that the search may enter; None for any other."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(value, nn.Module):
        return attributes
    if not isinstance(attributes, dict) or isinstance(value, (FunctionType, MethodType, partial, Tensor)):
        return None
    bases = [base.__module__ for base in type(value).__mro__]
    if bases[0].partition(".")[0] in sys.stdlib_module_names or bases[0].startswith(_COMPILER):
        return None
    if any(base.startswith(("lightning.pytorch.trainer", "pytorch_lightning.trainer")) for base in bases):
        return None
    threads = any(type(held).__module__.partition(".")[0] in _OF_THREADS for held in attributes.values())
    return None if threads else attributes


def _begin(name: str, owner: Any) -> list[tuple[str, Any, int, list[int]]]:
    """Return where a search begins: at an object; for a module, also at all its submodules."""
    if not isinstance(owner, nn.Module):
        return [(name, owner, 0, [_MOST])]
    return [(_joined(name, f".{path}" if path else ""), part, 0, [_MOST]) for path, part in owner.named_modules()]


def _joined(name: str, step: str) -> str:
    return name + step if name else step.removeprefix(".")


def _within(value: Any) -> Iterable[tuple[str, Any]]:
    """Yield (step, object) for each object that an object holds."""
    if isinstance(value, nn.Module):
        yield from ((f".{key}", held) for key, held in value.named_parameters(recurse=False))
        yield from ((f".{key}", held) for key, held in value.named_buffers(recurse=False))
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", held) for key, held in value.items() if len(value) <= _MOST)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((f"[{place}]", held) for place, held in enumerate(value) if len(value) <= _MOST)
    elif isinstance(value, MethodType):
        yield "", value.__self__
    elif isinstance(value, partial):
        yield from (("", held) for held in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, FunctionType):
        yield from (("", cell.cell_contents) for cell in value.__closure__ or () if _is_filled(cell))
    yield from ((f".{key}", held) for key, held in (attributes_of(value) or {}).items() if key not in _ELSEWHERE)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading it is the test
    except ValueError:
        return False
    return True
