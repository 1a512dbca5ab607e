"""How the mixins read a batch: the forward pass, and the labels."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor

from lightning_trak.gradients.batch import describe


def forward(module: Any, batch: Any, *fields: str, hook: str, leave_out: tuple[str, ...] = ("labels",)) -> Tensor:
    """Run a module's forward on the inputs of a batch, and take a tensor from what it returns.

    Args:
        module: a module.
        batch: the inputs, a tensor or a mapping of keyword arguments, or ``(inputs, ...)``.
        fields: names that the tensor may have, where forward returns an object or a mapping.
        hook: the method to override where the batch or the result is of another form.
        leave_out: keys of a mapping that are not arguments of forward.

    Raises:
        TypeError: if it is of another form.
    """
    inputs = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if isinstance(inputs, Mapping):
        kwargs = {key: value for key, value in inputs.items() if key not in leave_out}
        _check_taken(module, batch, kwargs, hook)
        result = module(**kwargs)
    elif isinstance(inputs, Tensor):
        result = module(inputs)
    else:
        raise _wrong_form(module, batch, hook)
    for field in fields:
        if isinstance(result, Mapping) and field in result:
            result = result[field]
        result = getattr(result, field, result)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"{type(module).__name__}.forward returned {describe(result)}; expected a tensor or an object with"
            f" .{fields[0]}. Override {hook}(self, batch)."
        )
    return result


def labels_or_none(batch: Any) -> Any:
    """Return what stands where labels are: ``batch[1]``, or ``batch["labels"]``; None if there is nothing."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (list, tuple)) and len(batch) >= 2 else None


def labels(module: Any, batch: Any, *, hook: str) -> Tensor:
    """Take the labels out of a batch ``(inputs, labels)`` or a mapping with ``"labels"``.

    Raises:
        TypeError: if there are none.
    """
    value = labels_or_none(batch)
    if not isinstance(value, Tensor):
        raise _wrong_form(module, batch, hook)
    return value


def _check_taken(module: Any, batch: Any, kwargs: Mapping[str, Any], hook: str) -> None:
    """Raise a TypeError if a module's forward does not take what a batch has."""
    try:
        signature(module.forward).bind(**kwargs)
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__}.forward cannot be called with {', '.join(map(repr, kwargs))} of the batch,"
            f" {describe(batch)}: {error}. Override {hook}(self, batch) to call it; labels are expected as 'labels'."
        ) from error


def _wrong_form(module: Any, batch: Any, hook: str) -> TypeError:
    return TypeError(
        f"The batch is {describe(batch)}; expected (inputs, labels) or a mapping with 'labels'. Override"
        f" {hook}(self, batch) in {type(module).__name__} to say where to find them."
    )
