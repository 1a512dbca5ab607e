"""Batches of any structure: find their tensors, replace them, describe a batch in an error message."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass
class NumberedBatch:
    """A batch, with what the module's ``number_examples`` returned for its rows.

    The numbers are one more tensor of the batch, so an engine slices and reorders them together with the examples. The
    module's methods get the batch alone; see `with_numbers_told`.

    Attributes:
        batch: what ``model_output`` takes.
        numbers: (b, ...).
    """

    batch: Any
    numbers: Tensor


def with_more(batch: Any, more: Tensor) -> Any:
    """Return a pair of a batch and a tensor with a row for each example; if the batch is numbered, so is the pair.

    >>> import torch
    >>> with_more(NumberedBatch("batch", torch.tensor([3])), torch.zeros(1)).batch
    ('batch', tensor([0.]))
    """
    return NumberedBatch((batch.batch, more), batch.numbers) if isinstance(batch, NumberedBatch) else (batch, more)


@contextmanager
def with_numbers_told(module: nn.Module, args: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield the arguments for a method of a module, with each `NumberedBatch` replaced by its batch.

    Meanwhile, the numbers are the module's attribute ``example_numbers``.

    >>> import torch
    >>> module = nn.Identity()
    >>> with with_numbers_told(module, [NumberedBatch("batch", torch.tensor([3]))]) as args:
    ...     args, module.example_numbers
    (['batch'], tensor([3]))
    """
    numbered = [arg for arg in args if isinstance(arg, NumberedBatch)]
    attributes = vars(module)
    for arg in numbered:
        attributes["example_numbers"] = arg.numbers
    try:
        yield [arg.batch if isinstance(arg, NumberedBatch) else arg for arg in args]
    finally:
        if numbered:
            attributes.pop("example_numbers", None)


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Rebuild ``batch`` with ``function`` applied to every tensor in it.

    Mappings (Hugging Face's ``BatchEncoding`` too), lists, tuples, named tuples and dataclasses are entered; anything
    else is kept as it is.

    >>> import torch
    >>> map_tensors({"x": torch.ones(2), "name": "a"}, lambda tensor: tensor.sum().item())
    {'x': 2.0, 'name': 'a'}
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(value, function) for key, value in batch.items()}
        try:
            return type(batch)(items)  # type: ignore[call-arg]
        except TypeError:  # its constructor takes other arguments, e.g. that of defaultdict
            return items
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(value, function) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        rebuilt = copy(batch)  # not its constructor, which may take other arguments, or check the values
        for name in _fields(batch):
            object.__setattr__(rebuilt, name, map_tensors(getattr(batch, name), function))  # frozen ones too
        return rebuilt
    return batch


def _fields(batch: Any) -> list[str]:
    """Return the names of a dataclass's fields that are set."""
    return [field.name for field in dataclasses.fields(batch) if hasattr(batch, field.name)]


def fresh(batch: Any) -> Any:
    """Copy the containers of a batch, but not its tensors: a method may then pop entries from the copy.

    >>> batch = {"x": 1, "y": 2}
    >>> fresh(batch).pop("y"), batch
    (2, {'x': 1, 'y': 2})
    """
    return map_tensors(batch, lambda tensor: tensor)


def tensors_of(batch: Any) -> list[Tensor]:
    """List the tensors of ``batch`` in the order in which `map_tensors` visits them.

    >>> import torch
    >>> [tuple(tensor.shape) for tensor in tensors_of((torch.ones(4, 2), {"y": torch.ones(4)}))]
    [(4, 2), (4,)]
    """
    return list(_tensors_of(batch))


def _tensors_of(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from (tensor for value in batch.values() for tensor in _tensors_of(value))
    elif isinstance(batch, (list, tuple)):
        yield from (tensor for value in batch for tensor in _tensors_of(value))
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        yield from (tensor for name in _fields(batch) for tensor in _tensors_of(getattr(batch, name)))


def with_tensors(batch: Any, tensors: list[Tensor]) -> Any:
    """Rebuild ``batch`` with its tensors replaced by ``tensors``, in the order of `tensors_of`."""
    following = iter(tensors)
    return map_tensors(batch, lambda _: next(following))


def same_tensors(one: Any, other: Any) -> bool:
    """Return whether two batches of the same structure have equal tensors; NaN equals NaN.

    >>> import torch
    >>> same_tensors([torch.ones(2)], [torch.ones(2)]), same_tensors([torch.ones(2)], [torch.zeros(2)])
    (True, False)
    """
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(
        first.shape == second.shape and bool(first.double().allclose(second.double(), rtol=0, atol=0, equal_nan=True))
        for first, second in pairs
    )


def describe(batch: Any) -> str:
    """Say in one line what ``batch`` is made of, for error messages.

    >>> import torch
    >>> describe({"x": torch.ones(4, 2), "label": [1, 2]})
    'dict(x: Tensor(4, 2), label: list(int, int))'
    """
    if isinstance(batch, Tensor):
        return f"Tensor{tuple(batch.shape)}"
    if isinstance(batch, NumberedBatch):
        return describe(batch.batch)
    name = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{name}({', '.join(f'{key}: {describe(value)}' for key, value in batch.items())})"
    if isinstance(batch, (list, tuple)):
        shown = ", ".join(describe(value) for value in batch[:4])
        return f"{name}({shown}{', ...' if len(batch) > 4 else ''})"
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [f"{field.name}: {describe(getattr(batch, field.name))}" for field in dataclasses.fields(batch)]
        return f"{name}({', '.join(fields)})"
    return name


def check_rows(batch: Any, size: int) -> str | None:
    """Return None if every tensor of ``batch`` has one row for each of ``size`` examples; else say what is wrong.

    >>> import torch
    >>> check_rows((torch.ones(4, 2), torch.ones(3)), size=4)
    'not every tensor of the batch has 4 rows: tuple(Tensor(4, 2), Tensor(3,))'
    """
    tensors = tensors_of(batch)
    if tensors and all(tensor.ndim and len(tensor) == size for tensor in tensors):
        return None
    return f"not every tensor of the batch has {size} rows: {describe(batch)}"
